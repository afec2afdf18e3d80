"""The string that ``--calibration`` takes: ``SOURCE[:key=value[,key=value...]][@WEIGHT]``.

``SOURCE`` is the name of a set, a file, or ``self``. Only the end of the string is looked at, and a string that is the
name of an existing file is that file, so paths may contain ``:``, ``,``, ``@`` and ``=``. A value with one of these
characters is written with percent escapes (``field=a%2Cb``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

from compressor.calibration.spec import JOINS, SAMPLINGS, SourceSpec, named_set, read_set, set_names
from compressor.errors import UserError, nearest

FILE_TYPES = (".txt", ".jsonl", ".parquet", ".safetensors", ".npy", ".yaml")
OPTIONS = ("field", "join", "sampling", "bos", "overlap")
_WEIGHT = re.compile(r"@([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\Z")
_OPTION_LIST = re.compile(r":([a-z_]+=[^:,@=]*(?:,[a-z_]+=[^:,@=]*)*)\Z")
_BOOLEANS = {"yes": True, "true": True, "no": False, "false": False}


@dataclass(frozen=True)
class Request:
    """One parsed ``--calibration``: ``source`` as typed, its ``options``, and its share of the samples."""

    source: str
    options: dict[str, str] = field(default_factory=dict)
    weight: float = 1.0

    def __str__(self) -> str:
        listed = ",".join(f"{key}={quote(value, safe=' ')}" for key, value in self.options.items())
        return f"{self.source}{':' if listed else ''}{listed}@{self.weight!r}"


def parse_source(text: str) -> Request:
    """Split ``SOURCE[:key=value,...][@WEIGHT]``; nothing is read.

    Raises:
        UserError: empty string, unknown or repeated option, weight that is not positive.
    """
    if not text.strip():
        raise UserError("an empty calibration source was given", fix="give a name or a file to --calibration")
    if _is_file(text):
        return Request(text)
    weight = 1.0
    found = _WEIGHT.search(text)
    if found:
        weight, text = float(found.group(1)), text[: found.start()]
        if not 0 < weight < float("inf"):
            raise UserError(
                f"calibration source {text!r}: its weight must be above 0, not {weight}", fix="--calibration"
            )
    if _is_file(text):
        return Request(text, weight=weight)
    listed = _OPTION_LIST.search(text)
    if not listed:
        return Request(text, weight=weight)
    options: dict[str, str] = {}
    for item in listed.group(1).split(","):
        key, _, value = item.partition("=")
        if key not in OPTIONS:
            raise UserError(f"calibration source {text!r}: unknown option {key!r}{nearest(key, OPTIONS)}")
        if key in options:
            raise UserError(f"calibration source {text!r}: option {key!r} is given twice", fix="give it once")
        options[key] = unquote(value)
    return Request(text[: listed.start()], options, weight)


def resolve(request: Request) -> SourceSpec:
    """Return what ``request`` means: a named set, a file, or ``self``, with its options applied.

    Raises:
        UserError: unknown name, missing or unreadable file, unknown file type, bad option value.
    """
    spec = _source_spec(request.source)
    changes: dict[str, object] = {}
    for key, value in request.options.items():
        if key in ("bos", "overlap"):
            if value.lower() not in _BOOLEANS:
                raise UserError(f"calibration source {request.source!r}: {key}={value!r} is neither yes nor no")
            changes[key] = _BOOLEANS[value.lower()]
        elif key in ("join", "sampling"):
            known = JOINS if key == "join" else SAMPLINGS
            if value not in known:
                raise UserError(
                    f"calibration source {request.source!r}: unknown {key} {value!r}{nearest(value, known)}"
                )
            changes[key] = value
        else:
            changes[key] = value
            changes["template"] = None
    return spec.model_copy(update=changes)


def _source_spec(source: str) -> SourceSpec:
    if source == "self":
        return SourceSpec(name="self", kind="self", description="sampled from the model itself")
    if source in set_names():
        return named_set(source)
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    looks_like_path = suffix in FILE_TYPES or "/" in source or "\\" in source or _is_file(source)
    if not looks_like_path:
        return named_set(source)  # raises, with the nearest names
    if path.is_dir():
        raise UserError(f"calibration source {source!r} is a folder", fix="give one file to --calibration")
    if not path.exists():
        raise UserError(f"calibration source {source!r}: no such file", fix="give an existing file to --calibration")
    if suffix not in FILE_TYPES:
        raise UserError(
            f"calibration source {source!r}: unknown file type {suffix!r} (known: {', '.join(FILE_TYPES)})",
            fix="rename or convert the file given to --calibration",
        )
    if suffix == ".yaml":
        return read_set(path)
    return SourceSpec(name=path.name, kind="file", path=str(path.resolve()))


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown ~user
        return False
