"""Blocks of GGUF out of integers and scales, bit by bit as ggml lays them out: nothing is rounded here.

    Q4_0    32 weights in 18 bytes: fp16 scale, then 16 bytes; the low halves hold weights 0 to 15 as code + 8, the high
            halves weights 16 to 31
    Q8_0    32 weights in 34 bytes: fp16 scale, then a signed byte each
    TQ2_0  256 weights in 66 bytes: two runs of 32 bytes, two bits a weight as trit + 1; byte i of a run holds weights
            i, i + 32, i + 64, i + 96 of its 128, the first lowest; then the fp16 scale
    TQ1_0  256 weights in 54 bytes: 32 bytes for five times 32 trits, 16 bytes for five times 16, 4 bytes for four times
            4, then the fp16 scale. The digits trit + 1 of a byte, the first the highest, are a number v in base 3 with
            five digits, stored as ceil(256 v / 243): multiplying by 3 then carries out digit after digit.

value = code * scale throughout. Source: ggml-quants.c, and its twin in numpy, ``gguf.quants``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Scales = NDArray[np.float32]


def q4_0(codes: Codes, scale: Scales) -> Bytes:
    """Pack ``codes`` (m, n) from -8 to 7 with ``scale`` (m, n / 32): (m, 18 n / 32) bytes."""
    blocks = (_blocks(codes, 32, -8, 7) + 8).astype(np.uint8)
    return _joined(codes, [_half(scale), blocks[..., :16] | (blocks[..., 16:] << 4)])


def q8_0(codes: Codes, scale: Scales) -> Bytes:
    """Pack ``codes`` (m, n) with ``scale`` (m, n / 32): (m, 34 n / 32) bytes."""
    return _joined(codes, [_half(scale), _blocks(codes, 32, -128, 127).view(np.uint8)])


def tq2_0(codes: Codes, scale: Scales) -> Bytes:
    """Pack ``codes`` (m, n) of -1, 0 and 1 with ``scale`` (m, n / 256): (m, 66 n / 256) bytes."""
    digits = (_blocks(codes, 256, -1, 1) + 1).astype(np.uint8).reshape(len(codes), -1, 2, 4, 32)
    packed = digits[..., 0, :] | (digits[..., 1, :] << 2) | (digits[..., 2, :] << 4) | (digits[..., 3, :] << 6)
    return _joined(codes, [packed.reshape(*packed.shape[:2], 64), _half(scale)])


def tq1_0(codes: Codes, scale: Scales) -> Bytes:
    """Pack ``codes`` (m, n) of -1, 0 and 1 with ``scale`` (m, n / 256): (m, 54 n / 256) bytes."""
    digits = _blocks(codes, 256, -1, 1) + 1
    pieces = [_in_base_3(digits[..., a:b], count) for a, b, count in ((0, 160, 5), (160, 240, 5), (240, 256, 4))]
    return _joined(codes, [*pieces, _half(scale)])


def _in_base_3(digits: NDArray[np.int8], count: int) -> Bytes:
    """Bytes (m, B, k / count) of ``digits`` (m, B, k): digit d of byte i is number d k / count + i."""
    runs = digits.astype(np.uint32).reshape(*digits.shape[:2], count, -1)
    powers = np.array([81, 27, 9, 3, 1][:count], dtype=np.uint32)
    number = (runs * powers[:, None]).sum(axis=-2)
    packed: Bytes = ((number * 256 + 242) // 243).astype(np.uint8)
    return packed


def _blocks(codes: Codes, size: int, low: int, high: int) -> Codes:
    """``codes`` as (m, n / size, size); ValueError when rows are no whole blocks or a code is too large."""
    m, n = codes.shape
    if n % size:
        raise ValueError(f"rows of {n} are no blocks of {size}")
    if codes.size and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())}: expected {low} to {high}")
    return codes.reshape(m, n // size, size)


def _half(scale: Scales) -> Bytes:
    """Scales (m, B) as bytes (m, B, 2) of fp16; ValueError when that would round one."""
    with np.errstate(over="ignore"):
        half = scale.astype("<f2")
    if not np.array_equal(half.astype(np.float32), scale):
        raise ValueError("a scale is no fp16 number")
    found: Bytes = half[..., None].view(np.uint8)
    return found


def _joined(codes: Codes, pieces: list[Any]) -> Bytes:
    return np.concatenate(pieces, axis=-1).reshape(len(codes), -1)


PACK: dict[str, tuple[int, Callable[[Codes, Scales], Bytes]]] = {
    "TQ1_0": (256, tq1_0),
    "TQ2_0": (256, tq2_0),
    "Q4_0": (32, q4_0),
    "Q8_0": (32, q8_0),
}
"""Type -> weights in a block, and what packs them."""
