"""Models on the Hugging Face hub: their names, fetching them, and what its client's many errors mean in one line."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import UserError

HUGGING_FACE = "https://huggingface.co"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}")
CHECKSUMS = "SHA256SUMS"
"""File beside the weights with their SHA-256, as ``sha256sum`` writes and checks it."""

WANTED = (
    "*.json", "*.safetensors", "*.model", "*.txt", "*.md", "*.jinja", "*.py", "*.tiktoken", "*.yaml",
    "LICENSE*", "NOTICE*", CHECKSUMS,
)  # fmt: skip
"""Files that are fetched with a model."""


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


def fetch(model: HubName) -> Path:
    """Download a model, or find it in the cache; an interrupted download goes on where it stopped.

    What this call has downloaded is held against the SHA-256 that the hub gives for it, and `CHECKSUMS` where the
    model has one; what does not fit is removed from the cache.

    Raises:
        UserError: see `hub_error`; also for a model without safetensors and a wrong checksum.
    """
    with translated(model):
        from huggingface_hub import snapshot_download
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name

        blobs = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=model.id, repo_type="model") / "blobs"
        before = set(os.listdir(blobs)) if blobs.is_dir() else set()
        folder = Path(snapshot_download(model.id, revision=model.revision, allow_patterns=list(WANTED)))
    _check_fetched(folder, before, model)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{model} holds no *.safetensors files",
            fix=f"fetch it with `hf download {model.id}` and give the folder: plain tensors in .bin files are read there",
        )
    return folder


def _check_fetched(folder: Path, before: set[str], model: HubName) -> None:
    """Hash the files whose blobs are new. A blob is named by the hub's ETag: the SHA-256 of all large files."""
    listed = read_checksums(folder)
    for file in sorted(folder.iterdir()):
        blob = file.resolve()
        if not file.is_symlink() or blob.name in before:  # without links, nothing tells what is new
            continue
        expected = {blob.name} if SHA256.fullmatch(blob.name) else set()
        expected |= {listed[file.name]} if file.name in listed else set()
        if expected and expected != {sha256_of(blob)}:
            blob.unlink()
            file.unlink()
            raise UserError(
                f"{file.name} of {model} does not have the checksum that the hub gives for it, and was removed again",
                fix="the same command fetches it anew",
            )


def read_checksums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 from a folder's `CHECKSUMS`; empty without one. Lines of another form are passed over."""
    file = folder / CHECKSUMS
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    found = (re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in lines)
    return {match[2]: match[1] for match in found if match}


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


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


@contextmanager
def translated(model: HubName, endpoint: str | None = None, *, doing: str = "fetch") -> Iterator[None]:
    """Turn what huggingface_hub raises in the body into a `UserError` of one line.

    Args:
        endpoint: URL of the hub, where it is not the configured one.
        doing: ``fetch`` or ``push``: what a full disk or a refusal is about.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise hub_error(error, model, endpoint, doing=doing) from error


def hub_error(error: BaseException, model: HubName, endpoint: str | None = None, *, doing: str = "fetch") -> UserError:
    """Say in one line what an error of huggingface_hub means, and what mends it."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, OfflineModeIsEnabled

    hub = (endpoint or constants.ENDPOINT).rstrip("/")
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, OfflineModeIsEnabled):
            what = f"{model} is not in the cache" if doing == "fetch" else "nothing can be uploaded"
            return UserError(f"{what}, and HF_HUB_OFFLINE keeps compressor off the network", fix="unset HF_HUB_OFFLINE")
        if isinstance(cause, HfHubHTTPError):
            return _answered(cause, model, hub, doing)
        if isinstance(cause, HFValidationError):
            return UserError(f"{model.id!r} is no name that a hub allows: {_first_line(cause)}", fix="namespace/name")
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(
                f"the disk is full: {model} does not fit {constants.HF_HUB_CACHE}",
                fix="free space there, or set HF_HOME to a folder on a larger disk; the same command goes on",
            )
        if isinstance(cause, httpx2.TimeoutException):
            return UserError(f"{hub} did not answer in time", fix="check the network; the same command goes on")
        if isinstance(cause, httpx2.ConnectError | httpx2.ProxyError):
            return UserError(
                f"cannot reach {hub} ({_first_line(cause)})",
                fix="check the network"
                + ("" if hub == HUGGING_FACE else " and the address")
                + (", or give a local folder" if doing == "fetch" else "; the same command goes on"),
            )
        if isinstance(cause, httpx2.TransportError) or "Consistency check failed" in str(cause):
            return UserError(f"the connection to {hub} broke off", fix="the same command goes on where it stopped")
    return UserError(
        f"{hub} did something unexpected with {model}: {type(causes[0]).__name__}: {_first_line(causes[0])}",
        fix="check the address, or try again",
    )


def _answered(error: Any, model: HubName, hub: str, doing: str) -> UserError:
    """The same of an error status with which the hub has answered."""
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, RevisionNotFoundError

    status, told = error.response.status_code, error.server_message
    told = f" ({' '.join(str(told).split())})" if told else ""
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{model.id} is gated: its authors want its terms accepted first",
            fix=f"accept them at {hub}/{model.id}, then set HF_TOKEN (or run `hf auth login`)",
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{model.id} has no revision {model.revision or 'main'!r}",
            fix=f"its branches and tags are at {hub}/{model.id}/tree/main",
        )
    if isinstance(error, DisabledRepoError):
        return UserError(f"{hub} has switched {model.id} off", fix="choose another model")
    if status == 401 and "credentials" in (str(error) + str(error.response.headers.get("X-Error-Message"))).lower():
        return UserError(f"{hub} does not accept the token", fix="make another and set HF_TOKEN (or run `hf auth login`)")
    if status in (401, 404):  # a hub answers 401 for what does not exist, too: it does not tell the two apart
        return UserError(
            f"{hub} has no model {model.id!r}, or it is private",
            fix="check the name; set HF_TOKEN (or run `hf auth login`) if it is private",
        )
    if status == 403:
        right = "write to" if doing == "push" else "read"
        return UserError(f"the token may not {right} {model.id}{told}", fix=f"make one that may, at {hub}/settings/tokens")
    if status == 413:
        return UserError(f"{hub} takes no files of this size{told}", fix="free space there, or use another hub")
    if status == 429:
        return UserError(f"{hub} allows no more requests for now", fix=f"try again {_when(error.response.headers)}")
    if status >= 500:
        return UserError(f"{hub} has a problem of its own (status {status}{told})", fix="try the same command later")
    return UserError(f"{hub} refused with status {status}{told}", fix=f"see {hub}/{model.id}")


def _when(headers: Mapping[str, str]) -> str:
    """When a rate limit ends, in words."""
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(headers)
    wait = headers.get("Retry-After") or (str(limit.reset_in_seconds) if limit else "")
    return f"in {wait} seconds" if wait.isdigit() else "later"


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from, the last first: wrappers tell less."""
    chain: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in chain:
        chain.append(step)
        step = step.__cause__
    return chain


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
