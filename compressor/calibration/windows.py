"""Windows of token ids drawn from a stream or from long documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from compressor.calibration.tokens import Tokenizer, encode
from compressor.errors import UserError

MAX_SKIPPED = 100_000
"""Documents that ``random-crop`` looks at before it gives up."""

_FIX = "lower --nsamples or --seqlen, or give more text to --calibration"


def generator_for(seed: int, index: int) -> torch.Generator:
    """Return a CPU generator of its own for source number ``index``; the global one is never touched."""
    digest = hashlib.sha256(f"calibration {seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def share_samples(weights: Sequence[float], nsamples: int) -> list[int]:
    """Split ``nsamples`` by ``weights`` (largest remainder; ties go to the earlier source); the sum is exact.

    Raises:
        UserError: a source would get nothing.
    """
    total = sum(weights)
    exact = [nsamples * (weight / total) for weight in weights]
    counts = [int(value) for value in exact]
    order = sorted(range(len(weights)), key=lambda index: (counts[index] - exact[index], index))
    for index in order[: nsamples - sum(counts)]:
        counts[index] += 1
    if 0 in counts:
        number = counts.index(0) + 1
        raise UserError(
            f"calibration source {number} of {len(weights)} would get none of {nsamples} samples",
            fix="raise --nsamples or its weight",
        )
    return counts


def draw_windows(
    stream: Tensor,
    count: int,
    length: int,
    generator: torch.Generator,
    *,
    what: str,
    overlap: bool = False,
    in_order: bool = False,
) -> Tensor:
    """Return ``count`` windows (count, length) int64 of ``stream`` (tokens,).

    Without ``overlap`` the stream is cut, from a random offset, into slots of ``length`` and ``count`` different slots
    are drawn; ``in_order`` takes the first ``count`` slots from offset 0. With ``overlap`` every start is equally
    likely.

    Raises:
        UserError: the stream is too short; says how many tokens there are and how many are needed.
    """
    tokens = len(stream)
    needed = length if overlap else count * length
    if tokens < needed:
        most = tokens // length
        fix = f"use --nsamples {most}, lower --seqlen, or give more text to --calibration" if most else _FIX
        raise UserError(f"{what}: too short: {tokens} tokens, {needed} are needed for {count} x {length}", fix=fix)
    if overlap:
        starts = torch.randint(tokens - length + 1, (count,), generator=generator)
    elif in_order:
        starts = torch.arange(count) * length
    else:
        slots = tokens // length
        offset = int(torch.randint(tokens - slots * length + 1, (1,), generator=generator))
        starts = torch.randperm(slots, generator=generator)[:count] * length + offset
    return stream[starts[:, None] + torch.arange(length)]


def cut_rows(rows: Tensor, length: int) -> Tensor:
    """Cut each row of ``rows`` (N, L) into windows of ``length``: (N * (L // length), length), the rest dropped."""
    per_row = rows.shape[1] // length
    return rows[:, : per_row * length].reshape(-1, length)


def draw_rows(rows: Tensor, count: int, length: int, generator: torch.Generator, *, what: str) -> Tensor:
    """Return ``count`` different windows (count, length) of the rows (N, L) of a pre-tokenized set.

    Raises:
        UserError: rows shorter than ``length``, or too few of them.
    """
    if rows.shape[1] < length:
        raise UserError(f"{what}: its windows have {rows.shape[1]} tokens, {length} are needed", fix="lower --seqlen")
    windows = cut_rows(rows, length)
    if len(windows) < count:
        raise UserError(
            f"{what}: too short: {len(windows)} windows of {length} tokens, {count} are needed",
            fix=f"use --nsamples {len(windows)}, or give more to --calibration",
        )
    return windows[torch.randperm(len(windows), generator=generator)[:count]]


def random_crops(
    documents: Iterable[str], tokenizer: Tokenizer, count: int, length: int, generator: torch.Generator, *, what: str
) -> tuple[Tensor, list[str]]:
    """Return one random window (count, length) of each of ``count`` documents of at least ``length`` tokens, and these.

    Documents that are too short are skipped, at most ``MAX_SKIPPED`` of them (GPTQ and SparseGPT do this for C4, and
    look for ever when there is no long one).

    Raises:
        UserError: not enough long documents.
    """
    windows: list[Tensor] = []
    used: list[str] = []
    seen = 0
    for text in documents:
        ids = encode(tokenizer, [text])[0]
        seen += 1
        if len(ids) >= length:
            start = int(torch.randint(len(ids) - length + 1, (1,), generator=generator))
            windows.append(torch.tensor(ids[start : start + length], dtype=torch.int64))
            used.append(text)
        if len(windows) == count or seen - len(windows) >= MAX_SKIPPED:
            break
    if len(windows) < count:
        raise UserError(
            f"{what}: only {len(windows)} of {seen} documents have {length} tokens, {count} are needed (random-crop)",
            fix="lower --nsamples or --seqlen, or add :sampling=concatenate, which joins short documents",
        )
    return torch.stack(windows), used
