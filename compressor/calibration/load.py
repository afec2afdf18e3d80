"""Calibration data: from the strings of ``--calibration`` to windows of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.calibration.documents import file_sha256, is_plain_text, is_pretokenized, read_documents
from compressor.calibration.parse import Request, parse_source, resolve
from compressor.calibration.pool import read_pool, shuffled
from compressor.calibration.pretokenized import read_ids
from compressor.calibration.spec import SourceSpec
from compressor.calibration.tokens import (
    Tokenizer,
    check_vocabulary,
    private_copy,
    sha256_ids,
    sha256_texts,
    vocabulary_size,
)
from compressor.calibration.windows import draw_rows, draw_windows, generator_for, random_crops, share_samples
from compressor.errors import UserError

Sampler = Callable[[int, int, int], Tensor]
"""``sampler(nsamples, length, seed)`` -> ids (nsamples, length) int64, sampled from the model (source ``self``)."""


@dataclass(frozen=True)
class TokenWindows:
    """Calibration data of one run.

    Attributes:
        ids: (nsamples, seqlen) int64.
        sources: one plain dict for each source, for the report: where it was read, hashes, counts, rules.
        origin: for each window, the number of its source.
        sha256: of the bytes of ``ids`` (int64, little-endian).
        preview: the tokens of window 0 as strings, to show where they end.
    """

    ids: Tensor
    sources: tuple[dict[str, Any], ...]
    origin: tuple[int, ...]
    sha256: str
    preview: list[str]


def load_calibration(
    specs: Sequence[str],
    tokenizer: Tokenizer,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    sampler: Sampler | None = None,
) -> TokenWindows:
    """Return ``nsamples`` windows of ``seqlen`` tokens from the sources in ``specs``, mixed by their weights.

    Each string is ``SOURCE[:key=value,...][@WEIGHT]`` (see ``parse.py``). Windows hold no BOS unless ``:bos=yes``. The
    same arguments give the same ids; every source has a generator of its own. ``tokenizer`` is not changed.

    Raises:
        UserError: unknown set, unreadable file, wrong column, too little text, ids outside the vocabulary.
    """
    for value, flag in ((nsamples, "--nsamples"), (seqlen, "--seqlen")):
        if value < 1:
            raise UserError(f"{flag} must be at least 1, not {value}", fix=f"raise {flag}")
    if not specs:
        raise UserError("no calibration source was given", fix="give a name or a file to --calibration")
    requests = [parse_source(text) for text in specs]
    resolved = [resolve(request) for request in requests]
    counts = share_samples([request.weight for request in requests], nsamples)
    private = private_copy(tokenizer)
    parts: list[Tensor] = []
    sources: list[dict[str, Any]] = []
    for index, (request, spec, count) in enumerate(zip(requests, resolved, counts, strict=True)):
        ids, facts = _draw(spec, private, count, seqlen, seed, index, sampler)
        parts.append(ids)
        sources.append(_describe(request, spec, count, facts))
    origin = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    windows = torch.cat(parts)
    if len(counts) > 1:  # a method that reads only the first windows must see every source
        order = torch.randperm(nsamples, generator=generator_for(seed, -1))
        windows, origin = windows[order], origin[order]
    preview = [str(token) for token in private.convert_ids_to_tokens(windows[0].tolist())]
    return TokenWindows(windows, tuple(sources), tuple(origin.tolist()), sha256_ids(windows), preview)


def _draw(
    spec: SourceSpec, tokenizer: Tokenizer, count: int, seqlen: int, seed: int, index: int, sampler: Sampler | None
) -> tuple[Tensor, dict[str, Any]]:
    """Return the windows (count, seqlen) of one source and what the report says about it."""
    length = seqlen - 1 if spec.bos else seqlen
    if spec.bos and (tokenizer.bos_token_id is None or length < 1):
        raise UserError(
            f"{spec.name}: bos=yes needs a tokenizer with a BOS token and --seqlen above 1", fix="use bos=no"
        )
    what = f"calibration source {spec.name!r}"
    generator = generator_for(seed, index)
    if spec.kind == "self":
        ids, facts = _from_model(sampler, count, length, generator.initial_seed())
        check_vocabulary(ids, vocabulary_size(tokenizer), what)
    elif is_pretokenized(spec):
        stored = read_ids(Path(spec.path), spec.field)
        check_vocabulary(stored, vocabulary_size(tokenizer), what)
        if stored.dim() == 1:
            ids = draw_windows(stored, count, length, generator, what=what, overlap=spec.overlap)
        else:
            ids = draw_rows(stored, count, length, generator, what=what)
        facts = {"tokens": stored.numel(), "sampling": "pre-tokenized", "text_sha256": sha256_ids(stored)}
    else:
        ids, facts = _from_text(spec, tokenizer, count, length, generator, what)
    if spec.bos:
        first = torch.full((count, 1), int(tokenizer.bos_token_id or 0), dtype=torch.int64)
        ids = torch.cat([first, ids], dim=1)
    return ids.contiguous(), facts


def _from_text(
    spec: SourceSpec, tokenizer: Tokenizer, count: int, length: int, generator: torch.Generator, what: str
) -> tuple[Tensor, dict[str, Any]]:
    documents = read_documents(spec, tokenizer)
    seed = generator.initial_seed()
    if spec.sampling == "random-crop":
        order = torch.Generator().manual_seed(seed)
        ids, texts = random_crops(shuffled(documents, order), tokenizer, count, length, generator, what=what)
        facts: dict[str, Any] = {"tokens": ids.numel(), "join": None}
    else:
        join = "none" if spec.join is None and is_plain_text(spec) else spec.join
        needed = length if spec.overlap else count * length
        pool = read_pool(documents, tokenizer, spec, join, needed, seed)
        texts = pool.texts
        if not any(text.strip() for text in texts):
            raise UserError(f"{what}: holds no text", fix="give a file with text to --calibration")
        ids = draw_windows(
            pool.ids, count, length, generator, what=what, overlap=spec.overlap, in_order=spec.sampling == "first"
        )
        facts = {"tokens": len(pool.ids), "join": pool.joined.join}
    facts |= {"sampling": spec.sampling, "documents": len(texts), "characters": sum(map(len, texts))}
    return ids, facts | {"text_sha256": sha256_texts(texts)}


def _from_model(sampler: Sampler | None, count: int, length: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    if sampler is None:
        raise UserError(
            "calibration source 'self' needs the model, which is not at hand here", fix="--calibration FILE"
        )
    ids = sampler(count, length, seed)
    if tuple(ids.shape) != (count, length):
        raise ValueError(f"the sampler returned {tuple(ids.shape)}, expected {(count, length)}")
    return ids.to(device="cpu", dtype=torch.int64), {"tokens": count * length, "sampling": "sampled from the model"}


def _describe(request: Request, spec: SourceSpec, count: int, facts: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {
        "spec": str(request),
        "name": spec.name,
        "kind": spec.kind,
        "use": spec.use,
        "identity": spec.identity,
        "weight": request.weight,
        "samples": count,
        "bos": spec.bos,
        "overlap": spec.overlap,
        "licence": spec.licence,
    }
    if spec.kind == "hub":
        about |= {
            "hub": spec.path,
            "config": spec.config,
            "split": spec.split,
            "data_files": list(spec.data_files or ()),
            "revision": spec.revision,
            "pinned": spec.pinned,
        }
    elif spec.kind == "file":
        about |= {"path": spec.path, "file_sha256": file_sha256(Path(spec.path))}
    return about | facts
