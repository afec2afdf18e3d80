"""Evaluation texts: windows of token ids and the protocol they were made by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.calibration.documents import file_sha256, is_plain_text, is_pretokenized, read_documents
from compressor.calibration.parse import parse_source, resolve
from compressor.calibration.pretokenized import read_ids
from compressor.calibration.spec import EvaluationRule, SourceSpec
from compressor.calibration.tokens import (
    SEPARATORS,
    Tokenizer,
    check_vocabulary,
    private_copy,
    sha256_ids,
    vocabulary_size,
)
from compressor.calibration.windows import cut_rows
from compressor.errors import UserError


@dataclass(frozen=True)
class EvaluationText:
    """One evaluation text, cut into windows.

    Attributes:
        name: of the set, or of the file.
        ids: (W, seqlen) int64. Position 0 of a window is never predicted.
        protocol: plain dict for the report: windows, seqlen, stride, bos, join, dropped tokens, documents.
        n_tokens: text tokens that the windows cover (each counted once; BOS is none).
        n_bytes: UTF-8 bytes of the text these tokens stand for. With a mean negative log-likelihood of ``nll`` nats per
            predicted token, bits per byte = nll / ln 2 * n_tokens / n_bytes.
        text_sha256: of the joined text in UTF-8 (of the stored ids for a pre-tokenized file).
        sha256: of the bytes of ``ids`` (int64, little-endian).
        identity: equal for two sources that read the same data.
        path: local file, or hub id with revision.
        file_sha256: of a local file's bytes.
    """

    name: str
    ids: Tensor
    protocol: dict[str, Any]
    n_tokens: int
    n_bytes: int
    text_sha256: str
    sha256: str
    identity: str
    path: str
    file_sha256: str | None


def load_evaluation(
    spec: str,
    tokenizer: Tokenizer,
    *,
    seqlen: int,
    windows: int | None = None,
    bos: bool = False,
    stride: int | None = None,
) -> EvaluationText:
    """Return the windows of an evaluation text.

    ``spec`` is ``NAME`` or ``PATH``, with ``:field=``, ``:join=`` and ``:bos=`` as in ``parse.py``. Default protocol:
    documents joined by two newlines (a ``.txt`` file as it stands), tokenized once without special tokens,
    non-overlapping windows of ``seqlen``, the tail dropped, no BOS. With ``bos`` each window is BOS and ``seqlen - 1``
    tokens of text. ``stride`` below the window length makes windows overlap. ``windows=None`` takes all there are, or
    the number that is part of a named set's protocol. ``tokenizer`` is not changed.

    Raises:
        UserError: unknown set, unreadable file, fewer tokens than one window or than ``windows`` need.
    """
    _check_numbers(seqlen, windows, bos, stride)
    request = parse_source(spec)
    if request.weight != 1.0 or {"sampling", "overlap"} & set(request.options):
        raise UserError(f"evaluation text {spec!r}: takes neither weight, sampling nor overlap", fix="leave them out")
    source = resolve(request)
    if source.kind == "self":
        raise UserError("'self' cannot be an evaluation text", fix="give a name or a file to --text")
    bos = bos or source.bos
    private = private_copy(tokenizer)
    if bos and private.bos_token_id is None:
        raise UserError("a BOS was asked for, and the tokenizer has none", fix="leave out --bos")
    rule = source.evaluation or EvaluationRule(join="none" if is_plain_text(source) else "two-newlines")
    join = request.options.get("join", rule.join)
    length = seqlen - 1 if bos else seqlen
    step = stride or length
    text = _stored(source, private, length) if is_pretokenized(source) else _read(source, private, rule, join)
    wanted = windows if windows is not None else rule.windows
    count = min(_available(len(text.ids), length, step), wanted or len(text.ids))
    if count < (windows or 1):
        raise UserError(
            f"evaluation text {source.name!r}: too short: {len(text.ids)} tokens, "
            f"{length + ((windows or 1) - 1) * step} are needed for {windows or 1} windows of {length}",
            fix="lower --windows or --seqlen, or give a longer --text",
        )
    covered = length + (count - 1) * step
    starts = torch.arange(count) * step
    ids = text.ids[starts[:, None] + torch.arange(length)]
    if bos:
        ids = torch.cat([torch.full((count, 1), int(private.bos_token_id or 0), dtype=torch.int64), ids], dim=1)
    protocol = {
        "windows": count,
        "seqlen": seqlen,
        "stride": step,
        "bos": "every window" if bos else "none",
        "join": "pre-tokenized" if is_pretokenized(source) else join,
        "documents": text.documents,
        "tokens_in_text": len(text.ids),
        "tokens_dropped": len(text.ids) - covered,
        "use": source.use if "use" in source.model_fields_set else "evaluation",  # a file of no set has none of its own
        "revision": source.revision,
        "pinned": source.pinned,
    }
    local = source.kind == "file"
    return EvaluationText(
        name=source.name,
        ids=ids.contiguous(),
        protocol=protocol,
        n_tokens=covered,
        n_bytes=_bytes(text, covered, private),
        text_sha256=text.sha256,
        sha256=sha256_ids(ids),
        identity=source.identity,
        path=source.path if local else f"{source.path}@{source.revision}",
        file_sha256=file_sha256(Path(source.path)) if local else None,
    )


@dataclass(frozen=True)
class _Stream:
    """Ids (T,) int64; ``ends`` (T,) bytes of text up to the end of each token, absent for slow tokenizers."""

    ids: Tensor
    ends: Tensor | None
    documents: int | None
    sha256: str


def _check_numbers(seqlen: int, windows: int | None, bos: bool, stride: int | None) -> None:
    if seqlen < 2 + bos:
        raise UserError(f"--seqlen must be at least {2 + bos} to predict anything, not {seqlen}", fix="raise --seqlen")
    if windows is not None and windows < 1:
        raise UserError(f"--windows must be at least 1, not {windows}", fix="raise --windows")
    if stride is not None and not 1 <= stride <= seqlen - bos:
        raise UserError(f"--stride must be between 1 and {seqlen - bos}, not {stride}", fix="leave out --stride")


def _available(tokens: int, length: int, step: int) -> int:
    return 0 if tokens < length else (tokens - length) // step + 1


def _stored(source: SourceSpec, tokenizer: Tokenizer, length: int) -> _Stream:
    ids = read_ids(Path(source.path), source.field)
    check_vocabulary(ids, vocabulary_size(tokenizer), f"evaluation text {source.name!r}")
    digest = sha256_ids(ids)
    if ids.dim() == 2:  # a window never runs over the end of a row
        ids = cut_rows(ids, length).reshape(-1)
    return _Stream(ids, None, None, digest)


def _read(source: SourceSpec, tokenizer: Tokenizer, rule: EvaluationRule, join: str) -> _Stream:
    if source.kind == "hub" and source.evaluation is None:
        raise UserError(
            f"{source.name!r} is a calibration set without an evaluation protocol", fix="give another --text"
        )
    documents = list(islice(read_documents(source, tokenizer), rule.documents))
    if not any(text.strip() for text in documents):
        raise UserError(f"evaluation text {source.name!r}: holds no text", fix="give a file with text to --text")
    if join == "eos" and tokenizer.eos_token_id is None:
        raise UserError("join=eos: the tokenizer has no end-of-sequence token", fix="use join=two-newlines")
    texts = documents if join == "eos" else [SEPARATORS[join].join(documents)]
    ids: list[int] = []
    ends: list[Tensor] = []
    before = 0
    for index, text in enumerate(texts):
        if index:
            ids.append(int(tokenizer.eos_token_id or 0))
            ends.append(torch.tensor([before]))
        piece, piece_ends = _encode_with_ends(tokenizer, text)
        ids.extend(piece)
        if piece_ends is not None:
            ends.append(piece_ends + before)
        before += len(text.encode("utf-8"))
    digest = hashlib.sha256("".join(texts).encode("utf-8")).hexdigest()
    stream = torch.tensor(ids, dtype=torch.int64)
    all_ends = torch.cat(ends) if ends else torch.zeros(0, dtype=torch.int64)
    return _Stream(stream, all_ends if len(all_ends) == len(stream) else None, len(documents), digest)


def _encode_with_ends(tokenizer: Tokenizer, text: str) -> tuple[list[int], Tensor | None]:
    """Return the ids of ``text`` and, with a fast tokenizer, the UTF-8 bytes up to the end of each token."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    settings = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
    coded = tokenizer(text, return_offsets_mapping=fast, **settings)
    if not fast:
        return list(coded["input_ids"]), None
    characters = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (characters >= 0x80).astype(np.int64) + (characters >= 0x800) + (characters >= 0x10000)
    before = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.array([end for _, end in coded["offset_mapping"]], dtype=np.int64)
    return list(coded["input_ids"]), torch.from_numpy(before[ends])


def _bytes(text: _Stream, covered: int, tokenizer: Tokenizer) -> int:
    if text.ends is not None:
        return int(text.ends[covered - 1])
    return len(str(tokenizer.decode(text.ids[:covered].tolist())).encode("utf-8", "replace"))
