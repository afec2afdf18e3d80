"""Names of models on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import UserError

HUGGING_FACE = "https://huggingface.co"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A model on the hub: ``org/name``, and a branch, tag or commit (None: its main branch)."""

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


def parse_name(name: str, revision: str | None = None) -> HubName | None:
    """Read ``org/name`` or ``org/name@revision``; None when it has neither form.

    Args:
        revision: given apart from the name.

    Raises:
        UserError: the revision is empty, or given twice and differently.
    """
    model, at, own = name.partition("@")
    if not HUB_ID.fullmatch(model):
        return None
    if at and not own:
        raise UserError(f"{name!r} names no revision after the @", fix=f"{model}@main, or {model}")
    if own and revision is not None and revision != own:
        raise UserError(f"{name} and --revision {revision} name two revisions", fix="give one of them")
    return HubName(model, own or revision)


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache; None for any other folder."""
    inside = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if inside and COMMIT.fullmatch(folder.name) else None


def shown_name(folder: Path) -> str:
    """What to call a model folder: its name, or the hub id of one in the hub's cache."""
    folder = folder.resolve()
    if commit_of(folder) is None:
        return folder.name
    return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
