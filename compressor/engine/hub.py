"""Models on the Hugging Face hub: fetching them, and holding what came against its checksums."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor.engine.hub_errors import translated
from compressor.engine.hub_names import HUGGING_FACE, HubName
from compressor.engine.output import LICENCES
from compressor.errors import UserError

log = logging.getLogger("compressor.hub")
"""Says what is fetched; the command line shows it where the client's bars are not drawn."""

SHA256 = re.compile(r"[0-9a-f]{64}")
CHECKSUMS = "SHA256SUMS"
"""File beside the weights with their SHA-256, as ``sha256sum`` writes and checks it."""

UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))

WANTED = (
    "*.json", "*.safetensors", "*.model", "*.txt", "*.md", "*.jinja", "*.py", "*.tiktoken", "*.yaml",
    *LICENCES, CHECKSUMS,
)  # fmt: skip
"""Files that are fetched with a model."""


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
        before = {blob.name for blob in blobs.iterdir()} if blobs.is_dir() else set()
        if log.isEnabledFor(logging.INFO):
            _tell(model, blobs.parent, before)
        folder = Path(snapshot_download(model.id, revision=model.revision, allow_patterns=list(WANTED)))
    _check_fetched(folder, before, model)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{model} holds no *.safetensors files",
            fix=f"`hf download {model.id}` and give the folder it names: plain tensors in .bin files are read there",
        )
    return folder


def _tell(model: HubName, cache: Path, blobs: set[str]) -> None:
    """Log what of a model is not in the ``cache`` yet; where that cannot be known, or is nothing, nothing."""
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    try:
        info = HfApi().model_info(model.id, revision=model.revision, files_metadata=True)
    except (OSError, ValueError, httpx2.HTTPError):
        return  # the download meets the same and says it, or makes do with the cache
    snapshot = cache / "snapshots" / str(info.sha)
    files = {file.rfilename: file for file in info.siblings or []}
    sizes = [
        files[name].size or 0
        for name in filter_repo_objects(files, allow_patterns=list(WANTED))
        if (files[name].lfs.sha256 if files[name].lfs else files[name].blob_id) not in blobs
        and not (snapshot / name).exists()
    ]
    if sizes:
        unit, name = next((pair for pair in UNITS if sum(sizes) >= pair[0]), UNITS[-1])
        files_told = "1 file" if len(sizes) == 1 else f"{len(sizes)} files"
        log.info(f"fetching {model.id}@{model.revision or 'main'}: {files_told}, {sum(sizes) / unit:.3g} {name}")


def find_cached(model: HubName) -> Path | None:
    """The folder of a model that was fetched before, whole; None otherwise. Stays off the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(model.id, revision=model.revision, allow_patterns=list(WANTED), local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(found)


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


def has_xet(model: HubName, endpoint: str, token: str, *, pull_request: bool) -> bool:
    """Whether a hub takes uploads by Xet; its client would not ask, and fail where it does not.

    Raises:
        UserError: the hub cannot be reached (see `hub_error`).
    """
    if endpoint == HUGGING_FACE:
        return True
    with translated(model, endpoint, doing="push"):
        from urllib.parse import quote

        from huggingface_hub.utils import build_hf_headers, get_session

        at = f"{endpoint}/api/models/{model.id}/xet-write-token/{quote(model.revision or 'main', safe='')}"
        asked = {"create_pr": "1"} if pull_request else {}
        answer = get_session().get(at, headers=build_hf_headers(token=token), params=asked, timeout=30)
        return answer.status_code == 200 and "X-Xet-Cas-Url" in answer.headers


@contextmanager
def without_xet() -> Iterator[None]:
    """Let huggingface_hub upload by LFS in the body. It looks at its constant at every call, at the variable once."""
    from huggingface_hub import constants

    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before
