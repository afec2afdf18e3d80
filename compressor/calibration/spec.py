"""The description of one source of text: what stands in a YAML file of ``calibration/``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressor.calibration.folders import data_folder
from compressor.errors import UserError, nearest

Join = Literal["eos", "two-newlines", "newline", "space", "none"]
"""What stands between two documents: the tokenizer's end-of-sequence token, or a string (see ``tokens.SEPARATORS``)."""

Sampling = Literal["concatenate", "windows", "first", "random-crop"]
"""How windows are drawn from documents; docs/calibration.md says which published protocol is which."""

JOINS: tuple[str, ...] = get_args(Join)
SAMPLINGS: tuple[str, ...] = get_args(Sampling)


class EvaluationRule(BaseModel):
    """The published protocol of an evaluation text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    join: Join = Field(default="two-newlines", description="what stands between documents")
    documents: int | None = Field(default=None, gt=0, description="only the first so many documents")
    windows: int | None = Field(default=None, gt=0, description="at most so many windows; all when absent")


class SourceSpec(BaseModel):
    """One source of text. ``kind: hub`` is streamed through ``datasets``; ``kind: file`` is a local file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="the name that --calibration takes")
    description: str = Field(default="", description="one sentence")
    kind: Literal["hub", "file", "self"] = Field(description="where the text is")
    use: Literal["calibration", "evaluation"] = Field(default="calibration", description="what the set is meant for")
    path: str = Field(default="", description="hub id, or file (relative to the YAML file)")
    config: str | None = Field(default=None, description="configuration name on the hub")
    split: str = Field(default="train", description="split on the hub")
    data_files: tuple[str, ...] | None = Field(default=None, description="only these files of the hub repository")
    revision: str | None = Field(default=None, description="commit hash on the hub; a branch name is not pinned")
    field: str | None = Field(default=None, description="column with text, or with chat messages; picked when absent")
    template: str | None = Field(default=None, description="text made of columns: 'Question: {question}'")
    keep_empty: bool = Field(default=False, description="empty rows count as documents (the WikiText-2 protocol)")
    sampling: Sampling = Field(default="concatenate", description="how windows are drawn")
    join: Join | None = Field(default=None, description="what stands between documents when calibrating")
    bos: bool = Field(default=False, description="every window starts with BOS")
    overlap: bool = Field(default=False, description="windows may overlap (needs less text)")
    evaluation: EvaluationRule | None = Field(default=None, description="protocol when used as an evaluation text")
    licence: str = Field(default="", description="licence of the text")

    @model_validator(mode="after")
    def _consistent(self) -> SourceSpec:
        if self.kind == "hub" and self.revision is None:
            raise ValueError("a hub set needs a revision")
        if self.kind != "self" and not self.path:
            raise ValueError("path is missing")
        if self.field is not None and self.template is not None:
            raise ValueError("field and template exclude each other")
        return self

    @property
    def pinned(self) -> bool:
        """Whether the revision is a full commit hash, so that the text cannot change."""
        return self.revision is not None and re.fullmatch(r"[0-9a-f]{40}", self.revision) is not None

    @property
    def identity(self) -> str:
        """A string that is equal for two sources that read the same data."""
        if self.kind != "hub":
            return f"{self.kind}:{self.path}"
        files = ",".join(self.data_files or ())
        return f"hub:{self.path.lower()}:{self.config or ''}:{self.split}:{files}"


def set_names() -> list[str]:
    """Return the names of all sets in ``calibration/``, sorted."""
    return sorted(path.stem for path in data_folder("calibration").glob("*.yaml"))


def named_set(name: str) -> SourceSpec:
    """Return the set called ``name``.

    Raises:
        UserError: no such set; the nearest name is shown.
    """
    path = data_folder("calibration") / f"{name}.yaml"
    if name not in set_names():
        raise UserError(
            f"no calibration set is called {name!r}{nearest(name, [*set_names(), 'self'])}",
            fix="give a name or a local file to --calibration",
        )
    return read_set(path)


def read_set(path: Path) -> SourceSpec:
    """Read one YAML file; a relative ``path`` of a file set is taken from the folder of the YAML file.

    Raises:
        UserError: unreadable, not YAML, or a key that is unknown or wrong (the first one is named).
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})", fix="give a readable file to --calibration") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML ({str(error).splitlines()[0]})", fix="mend the file") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of keys", fix="see docs/calibration.md")
    for key in raw:
        if key not in SourceSpec.model_fields:
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), SourceSpec.model_fields)}")
    try:
        spec = SourceSpec(**raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: {where}: {first['msg']}", fix="see docs/calibration.md") from error
    if spec.kind == "file":
        return spec.model_copy(update={"path": str((path.parent / spec.path).resolve())})
    return spec
