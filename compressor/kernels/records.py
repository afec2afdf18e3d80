"""Levels to records: trits, integers and signs with their scales, as native/layout.hpp describes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressor.kernels.matrix import Kind, Matrix, room
from compressor.kernels.native import native

ROWS = 16
RECORD_INPUTS = (128, 64, 32)
TRITS = (Kind.TRIT1, Kind.TRIT2, Kind.TRIT3)
INTS = {2: Kind.INT2, 3: Kind.INT3, 4: Kind.INT4}
"""Bits of a code -> layout; all others are bytes in memory."""

WIDEST_SUM = {"avx2": 61}
"""Largest sum of the whole numbers that stand for the scales of planes, where it is not 125: pairs of products are
summed in 16 bits there. Both leave room for two, in case a processor rounds otherwise than this file."""


def record_inputs(group: int, n: int) -> int | None:
    """How many inputs a record has when ``group`` of ``n`` share a scale; None if records cannot be made to fit."""
    if group >= n:
        return RECORD_INPUTS[0]
    return next((size for size in RECORD_INPUTS if group % size == 0), None)


def joint_numbers(scale: Tensor, most: int) -> Tensor:
    """Return the whole number that should stand for the largest scale where planes are joined into levels of 8 bits.

    ``a[k] = round(scale[k] number / largest)`` then stands for scale[k], and a level is the sum of a[k] trits[k]. Every
    number is tried, and the one kept whose worst error is least relative to the largest scale.

    Args:
        scale: (K, ...) fp32, not negative.
        most: largest sum of ``a``.

    Returns:
        uint8 (...), from 1.
    """
    largest = scale.amax(0).clamp_min(1e-30)
    best, number = torch.full_like(largest, math.inf), torch.ones_like(largest)
    for first in range(max(1, most // len(scale)), most + 1):
        a = torch.floor(scale * (first / largest) + 0.5)
        error = (a * (largest / first) - scale).abs().amax(0) / largest
        better = (error < best) & (a.sum(0) <= most)
        best, number = torch.where(better, error, best), torch.where(better, first, number)
    return number.to(torch.uint8)


def _spread(values: Tensor, kb: int, group: int, n: int) -> Tensor:
    """From a value for every ``group`` inputs (m, G) to one for every record, padded to tiles: (tiles, records, 16)."""
    index = torch.arange(0, n, kb) // group
    rows = torch.nn.functional.pad(values[:, index], (0, 0, 0, -len(values) % ROWS))
    return rows.view(-1, ROWS, len(index)).transpose(1, 2).contiguous()


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _records(kind: Kind, entries: Tensor, tails: Tensor, kb: int, extra: Tensor | None = None) -> Matrix:
    """Pack planes of entries (P, m, n) uint8 and tails (tiles, records, bytes) uint8."""
    found = native()
    assert found is not None
    _, m, n = entries.shape
    width = {Kind.TRIT3: 128}.get(kind, 64)
    tails = torch.nn.functional.pad(tails, (0, width - tails.shape[-1])).contiguous()
    bits = {Kind.TRIT1: 2, Kind.TRIT2: 4, Kind.TRIT3: 6, Kind.INT2: 2, Kind.INT3: 3, Kind.INT4: 4, Kind.INT8: 8}
    data = room(tails.shape[0] * tails.shape[1] * (2 * bits.get(kind, 1) * kb + width))
    entries = entries.contiguous()
    found.module.pack_records(
        kind, m, n, kb, entries.data_ptr(), tails.data_ptr(), data.data_ptr(), data.numel(), torch.get_num_threads()
    )
    return Matrix(kind, m, n, kb, 1.0, data, extra)


def trit_records(trits: Tensor, scale: Tensor, group: int, level: str) -> Matrix:
    """Trits (K, m, n) int8 with scales (K, m, G) fp16; ``group`` inputs, or all, share a scale."""
    n, kb = trits.shape[2], record_inputs(group, trits.shape[2])
    assert kb is not None
    planes = len(trits)
    tails = torch.cat([_as_bytes(_spread(plane, kb, group, n)) for plane in scale], -1)
    extra = None
    if planes > 1:
        # in fp32 as the kernels see them, and spread after that: a number for every group, not for every record
        extra = _spread(joint_numbers(scale.float(), WIDEST_SUM.get(level, 125)), kb, group, n)
    return _records(TRITS[planes - 1], (trits + 1).view(torch.uint8), tails, kb, extra)


def int_records(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int) -> Matrix:
    """Codes (m, n) int8 from -2^(bits-1), scales (m, G) fp32 that fp16 has, zero points (m, G) int8 or None."""
    n, kb = codes.shape[1], record_inputs(group, codes.shape[1])
    assert kb is not None
    kind, shift = INTS.get(bits, Kind.INT8), 1 << (bits - 1)
    unsigned = (codes.to(torch.int16) + shift).to(torch.uint8)
    zeros = torch.full(scale.shape, shift, dtype=torch.uint8) if zero is None else (zero.to(torch.int16) + shift)
    entries = torch.stack([unsigned & 3, unsigned >> 2]) if kind is Kind.INT3 else unsigned[None]
    tails = [_as_bytes(_spread(scale.half(), kb, group, n)), _spread(zeros.to(torch.uint8), kb, group, n)]
    return _records(kind, entries, torch.cat(tails, -1), kb)


def sign_tails(scale: Tensor, mean: Tensor | None, kb: int, group: int, n: int) -> Tensor:
    """Scales and means (m, G) fp16 as tails of signs, uint8 (tiles, records, 64)."""
    mean = torch.zeros_like(scale) if mean is None else mean
    return torch.cat([_as_bytes(_spread(part, kb, group, n)) for part in (scale, mean)], -1)


def sign_records(signs: Tensor, scale: Tensor, mean: Tensor | None, group: int) -> Matrix:
    """Signs (m, n) bool, True = plus, with scales and means (m, G) fp16."""
    n, kb = signs.shape[1], record_inputs(group, signs.shape[1])
    assert kb is not None
    return _records(Kind.SIGN, signs[None].view(torch.uint8), sign_tails(scale, mean, kb, group, n), kb)
