"""The documents of a source of text, one string each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from compressor.calibration.hub import stream_rows
from compressor.calibration.rows import Row, ToText, row_reader
from compressor.calibration.spec import SourceSpec
from compressor.calibration.tokens import Tokenizer
from compressor.errors import UserError

_PIECE = 16_384


def is_pretokenized(spec: SourceSpec) -> bool:
    """Whether ``spec`` is a file of token ids."""
    return spec.kind == "file" and Path(spec.path).suffix.lower() in (".npy", ".safetensors")


def is_plain_text(spec: SourceSpec) -> bool:
    """Whether ``spec`` is a text file: its pieces follow each other without anything between."""
    return spec.kind == "file" and Path(spec.path).suffix.lower() == ".txt"


def read_documents(spec: SourceSpec, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the documents of ``spec`` in order, empty ones left out.

    A ``.txt`` file is yielded in pieces of whole lines of about 16 000 characters, which joined give the file back.

    Raises:
        UserError: unreadable file, invalid line (numbered), unknown column, hub out of reach.
    """
    if spec.kind == "hub":
        return _from_rows(((row, f"set {spec.name!r}") for row in stream_rows(spec)), spec, tokenizer)
    path = Path(spec.path)
    if is_plain_text(spec):
        return _text_pieces(path)
    rows = _json_rows(path) if path.suffix.lower() == ".jsonl" else _table_rows(path)
    return _from_rows(rows, spec, tokenizer)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def _from_rows(rows: Iterable[tuple[Row, str]], spec: SourceSpec, tokenizer: Tokenizer) -> Iterator[str]:
    reader: ToText | None = None
    for row, place in rows:
        if reader is None:
            reader = row_reader(row, spec.field, spec.template, tokenizer, place)
        text = reader(row, place)
        if not (spec.keep_empty or text.strip()):
            continue
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair, tokenizers take none
            raise UserError(f"{place}: holds text that is not valid Unicode ({error.reason})", fix="mend it") from error
        yield text


def _text_pieces(path: Path) -> Iterator[str]:
    held: list[str] = []
    size = 0
    try:
        # newline="" keeps the file's line ends, utf-8-sig drops a byte order mark
        with path.open(encoding="utf-8-sig", newline="") as file:
            while line := file.readline(_PIECE):
                held.append(line)
                size += len(line)
                if size >= _PIECE:
                    yield "".join(held)
                    held, size = [], 0
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if "".join(held).strip():
        yield "".join(held)


def _json_rows(path: Path) -> Iterator[tuple[Row, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise UserError(
                        f"{place}: invalid JSON ({error})", fix="mend that line, or leave it out"
                    ) from error
                if not isinstance(row, dict):
                    raise UserError(
                        f"{place}: expected a JSON object, found {type(row).__name__}", fix="mend that line"
                    )
                yield row, place
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _table_rows(path: Path) -> Iterator[tuple[Row, str]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}, row {number}"
    except pyarrow.ArrowException as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{path}: is not a readable parquet file ({reason})", fix="give another --calibration"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{path}: is not UTF-8 text ({error.reason})", fix="convert the file given to --calibration")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror or error})", fix="give a readable file to --calibration")
