"""What must be right with a folder before it is uploaded: it is ours, complete, and tells nothing it should not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.hub import sha256_of
from compressor.engine.output import OURS
from compressor.errors import UserError
from compressor.report.files import read_report
from compressor.report.linear_page import linear_page
from compressor.report.schema import Report
from compressor.report.schema_use import Exported
from compressor.run.places import shortened

Paths = Literal["refuse", "shorten", "allow"]

WEIGHTS = (".safetensors", ".gguf")
TEXTS = (".json", ".md", ".html", ".yaml", ".yml", ".txt", ".jinja", ".py")
OTHERS = (".model", ".tiktoken")
NAMES = re.compile(r"(LICENSE|LICENCE|NOTICE|COPYING)([.-].*)?|\.gitattributes")
"""Files without one of these ends that may be uploaded all the same."""

WORDS = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
"""Lists of tokens: what looks like a path there is a token."""

SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an API key": r"\bsk-(?:proj-|ant-|or-)?[A-Za-z0-9_-]{32,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{40,}",
    "a Google API key": r"\bAIza[\w-]{35}\b",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
SECRET = re.compile("|".join(f"({pattern})" for pattern in SECRETS.values()))

# of this machine: folders in which people and programs work, and drive letters (a backslash is two in JSON)
PLACES = r"home|Users|root|tmp|mnt|media|scratch|workspace|private|var/folders|Volumes"
PATH = re.compile(rf"(?<![\w.:/~\\-])/(?:{PLACES})/[^\s\"'`<>|,;:()\[\]{{}}\\]+")
DRIVE = {
    True: re.compile(r"(?<![\w])[A-Za-z]:\\\\[^\s\"'`<>|,;:()]+"),
    False: re.compile(r"(?<![\w])[A-Za-z]:\\(?![nrtux'\"\\])[^\s\"'`<>|,;:()]+"),
}


@dataclass(frozen=True)
class Piece:
    """A file to upload.

    Attributes:
        name: its path in the folder, with ``/``.
        text: what is uploaded in its place; None: the file as it is.
    """

    name: str
    file: Path
    text: str | None = None

    @property
    def size(self) -> int:
        """Bytes to upload."""
        return self.file.stat().st_size if self.text is None else len(self.text.encode())


@dataclass(frozen=True)
class Checked:
    """A folder that may be uploaded."""

    folder: Path
    report: Report
    pieces: tuple[Piece, ...]

    @property
    def weights(self) -> tuple[Piece, ...]:
        """The files whose checksums are uploaded with them."""
        return tuple(piece for piece in self.pieces if piece.name.endswith(WEIGHTS))


def check_folder(folder: Path, *, paths: Paths = "refuse") -> Checked:
    """Look through a folder; reads its headers and texts, not its weights.

    Args:
        paths: what becomes of absolute paths in texts: refused, cut to what tells them apart, or uploaded.

    Raises:
        UserError: not a finished folder of compressor's, a verification that failed, missing or truncated weights, a
            file that does not belong to a model, a secret, an absolute path.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is no folder", fix="give the folder that compressor has written")
    folder = folder.resolve()
    if any(part.endswith(".partial") for part in folder.parts[-2:]):
        raise UserError(
            f"{folder.name} is the unfinished result of a run", fix="let the run end: the same command goes on"
        )
    if not (folder / OURS).is_file() and any(folder.glob("*.gguf")):
        raise UserError(
            f"{folder.name} has no {OURS}: what it was made from is no model that compressor has changed",
            fix="`hf upload NAMESPACE/NAME FOLDER` uploads any folder",
        )
    if not (folder / OURS).is_file():
        raise UserError(f"{folder.name} was not written by compressor: it has no {OURS}", fix="give a folder that was")
    report = read_report(folder)
    _check_verified(report, folder)
    files = list(_files(folder, folder))
    if report.exported is not None:
        _check_listed(folder, report.exported)
    _check_complete(folder, files)
    if report.exported is not None:
        _check_size(folder, report.exported)
    return Checked(folder, report, tuple(_checked_text(name, file, paths) for name, file in files))


def _check_verified(report: Report, folder: Path) -> None:
    if report.verification is not None and not report.verification.passed:
        raise UserError(
            f"{folder.name} failed its verification: it does not compute what it should", fix="make it anew"
        )
    page = linear_page(report.linearization)
    if page is not None and page.failed:
        raise UserError(f"{folder.name} failed its proof: {'; '.join(page.failed)}", fix="make it anew")


def _files(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Files by name, folders within; refuses what does not belong to a model."""
    for file in sorted(folder.iterdir()):
        name = file.relative_to(root).as_posix()
        if file.is_symlink() and not file.resolve().is_relative_to(root):
            raise UserError(f"{name} is a link out of the folder", fix="put the file itself there, or remove the link")
        if file.name.startswith(".") and file.name != ".gitattributes":
            raise UserError(f"{name} is a hidden file, which no model needs", fix="move it out of the folder")
        if file.is_dir():
            yield from _files(file, root)
        elif file.name.endswith((*WEIGHTS, *TEXTS, *OTHERS)) or NAMES.fullmatch(file.name):
            yield name, file
        else:
            raise UserError(f"{name} is no file that belongs to a model", fix="move it out of the folder")


def _check_complete(folder: Path, files: list[tuple[str, Path]]) -> None:
    """Every shard of the index is there, as long as its header says, and no other weights are."""
    weights = {file for name, file in files if name.endswith(WEIGHTS) and "/" not in name}
    one_file = {file for file in weights if file.suffix == ".gguf"}
    for file in one_file:
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UserError(f"{file.name} is no GGUF file", fix="export it again")
    if one_file == weights and one_file:
        return
    stray = weights - one_file - set(open_checkpoint(folder).files)
    if stray:
        raise UserError(f"{min(stray).name} is not part of the model in {folder.name}", fix="move it out of the folder")


def _check_listed(folder: Path, exported: Exported) -> None:
    """Everything that the export has written is there (the card apart)."""
    if (gone := next((name for name in exported.files if not (folder / name).is_file()), None)) is not None:
        raise UserError(f"{gone} is missing in {folder.name}", fix="export it again")


def _check_size(folder: Path, exported: Exported) -> None:
    """The weights are as long as they were."""
    weights = sorted(file for file in folder.iterdir() if file.name.endswith(WEIGHTS))
    if (size := sum(file.stat().st_size for file in weights)) != exported.file_bytes:
        names = ", ".join(file.name for file in weights)
        raise UserError(f"{names}: {size:,} bytes, and {exported.file_bytes:,} were written", fix="export it again")


def _checked_text(name: str, file: Path, paths: Paths) -> Piece:
    """The piece of a file; refuses secrets, and does as asked about paths."""
    if not name.endswith(TEXTS) and not NAMES.fullmatch(PurePosixPath(name).name):
        return Piece(name, file)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text", fix="mend it, or move it out of the folder") from error
    if (found := SECRET.search(text)) is not None:
        what = list(SECRETS)[(found.lastindex or 1) - 1]
        raise UserError(f"{name}, line {_line(text, found.start())}, holds {what}", fix="remove it (and revoke it)")
    if paths == "allow" or PurePosixPath(name).name in WORDS:
        return Piece(name, file)
    patterns = (PATH, DRIVE[name.endswith(".json")])
    if paths == "shorten":
        short = text
        for pattern in patterns:
            places = shortened(pattern.findall(short))
            short = pattern.sub(lambda match, places=places: places[match[0]], short)  # type: ignore[misc]
        return Piece(name, file, None if short == text else short)
    for pattern in patterns:
        if (found := pattern.search(text)) is not None:
            raise UserError(
                f"{name}, line {_line(text, found.start())}, tells of this machine: {found[0]}",
                fix="--paths shorten uploads file names only, --paths allow leaves it as it is",
            )
    return Piece(name, file)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def checksums(checked: Checked) -> dict[str, str]:
    """Name -> SHA-256 of every weight file. Reads them."""
    return {piece.name: sha256_of(piece.file) for piece in checked.weights}
