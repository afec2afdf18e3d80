# mypy: ignore-errors
# (Triton's language is not Python's: constexpr parameters are no types, and kernels return nothing that has one)
"""Many tokens: the matrix unpacked, for the library's gemm; and the sum of what split programs found."""

from __future__ import annotations

import triton
import triton.language as tl

from compressor.kernels.triton.device.common import byte_field, rounded


@triton.jit
def dense_kernel(
    words, scale, zero, out, m, n, groups, blocks, plane,
    GROUP: tl.constexpr, OFFSET: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr,
    ROUND: tl.constexpr, ROWS: tl.constexpr, HAS_ZERO: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out (m, n) = the matrix, rounded to ``ROUND`` and then to the dtype of out; planes in order, as the format says.

    One program: ``ROWS`` rows of one block. words as uint8, the rest as in `gemm_kernel`.
    """
    fields: tl.constexpr = 8 // BITS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(row, m - 1).to(tl.int64)
    block = tl.program_id(1)
    byte = tl.arange(0, RUN)
    data = words + (inside * blocks * RUN + block * RUN)[:, None] + byte[None, :]
    packed0 = tl.load(data)
    if PLANES > 1:
        packed1 = tl.load(data + plane)
    if PLANES > 2:
        packed2 = tl.load(data + 2 * plane)
    for field in tl.static_range(fields):
        start = (block * fields + field) * RUN
        where = inside * groups + tl.minimum(start // GROUP, groups - 1)
        value = _values(packed0, scale, zero, where, field, OFFSET, BITS, HAS_ZERO, ASM)
        if PLANES > 1:
            value += _values(packed1, scale, zero, where + m * groups, field, OFFSET, BITS, HAS_ZERO, ASM)
        if PLANES > 2:
            value += _values(packed2, scale, zero, where + 2 * m * groups, field, OFFSET, BITS, HAS_ZERO, ASM)
        inputs = start + byte
        keep = (row < m)[:, None] & (inputs < n)[None, :]
        value = rounded(rounded(value, ROUND, ASM).to(tl.float32), out.dtype.element_ty, ASM)
        tl.store(out + (inside * n)[:, None] + inputs[None, :], value, mask=keep)


@triton.jit
def _values(
    packed, scale, zero, where, FIELD: tl.constexpr,
    OFFSET: tl.constexpr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    code = byte_field(packed, BITS, FIELD, ASM).to(tl.int32)
    if HAS_ZERO:
        code -= tl.load(zero + where).to(tl.int32)[:, None]
    else:
        code -= OFFSET
    return code.to(tl.float32) * tl.load(scale + where).to(tl.float32)[:, None]


@triton.jit
def reduce_kernel(partial, bias, out, m, tokens, SPLITS: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """out (tokens, m) = the sum over splits of partial fp32 (SPLITS, tokens, m), in order, plus bias."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros([ROWS], tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial + (split * tokens + token) * m + row, mask=row < m, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < m, other=0.0).to(tl.float32)
    tl.store(out + token * m + row, total, mask=row < m)
