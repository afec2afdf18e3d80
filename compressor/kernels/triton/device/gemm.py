# mypy: ignore-errors
# (Triton's language is not Python's: constexpr parameters are no types, and kernels return nothing that has one)
"""Some tokens: tensor cores with the matrix as the left operand, so that codes need not pass through shared memory."""

from __future__ import annotations

import triton
import triton.language as tl

from compressor.kernels.triton.device.common import byte_field, float_field


@triton.jit
def gemm_kernel(
    x, scales, sums, words, scale, zero, bias, out,
    m, n, stride, chunks, groups, tokens, blocks, steps, plane,
    EXACT: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr,
    RUN: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: ``ROWS`` outputs, ``steps`` blocks of their inputs, ``TOKENS`` tokens.

    x int8 (tokens, 128 chunks) with scales fp32 (tokens, chunks) and sums int32 (tokens, 128 chunks / SPAN); with
    ``EXACT`` x is any float (tokens, n), ``stride`` between tokens, and there is nothing else of it.
    words uint8 (PLANES, m, blocks * RUN), ``plane`` bytes each, scale (PLANES, m, groups), zero int8 likewise.
    out (splits, tokens, m): fp32 and without bias where there are several splits.

    Raw codes are multiplied; what they have in common, the scale of their group, is applied to the sum of their span.
    """
    fields: tl.constexpr = 8 // BITS
    together: tl.constexpr = SPAN // RUN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(row, m - 1).to(tl.int64)  # rows beyond the last compute it again, and are not stored
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    known = token < tokens
    byte = tl.arange(0, RUN)
    data = words + (inside * blocks * RUN)[:, None] + byte[None, :]
    right_at = x + (token.to(tl.int64) * stride)[None, :] + byte[:, None]
    kind: tl.constexpr = tl.float32 if EXACT else tl.int32
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    first = tl.program_id(1) * steps
    for block in range(first, tl.minimum(first + steps, blocks)):
        packed0 = tl.load(data + block * RUN)
        if PLANES > 1:
            packed1 = tl.load(data + plane + block * RUN)
        if PLANES > 2:
            packed2 = tl.load(data + 2 * plane + block * RUN)
        for part in tl.static_range(fields * RUN // SPAN):
            start = block * (fields * RUN) + part * SPAN
            where = inside * groups + tl.minimum(start // GROUP, groups - 1)
            sum_x = tl.zeros([TOKENS], tl.int32)
            if not EXACT:
                sum_x = tl.load(sums + token * chunks * (128 // SPAN) + start // SPAN, mask=known, other=0)
            product0 = tl.zeros([ROWS, TOKENS], kind)
            product1 = tl.zeros([ROWS, TOKENS], kind)
            product2 = tl.zeros([ROWS, TOKENS], kind)
            for i in tl.static_range(together):
                mask = known[None, :]
                if EXACT:
                    mask = mask & (start + i * RUN + byte < n)[:, None]
                right = tl.load(right_at + (start + i * RUN), mask=mask, other=0)
                if EXACT and not ASM:
                    right = right.to(tl.float32)  # Triton's interpreter multiplies the bits of bf16 as if integers
                left = _left(packed0, zero, where, right, part * together + i, EXACT, OFFSET, BITS, HAS_ZERO, ASM)
                product0 = tl.dot(left, right, product0, input_precision="ieee", out_dtype=kind)
                if PLANES > 1:
                    left = _left(packed1, zero, where + m * groups, right, part * together + i, EXACT, OFFSET, BITS,
                                 HAS_ZERO, ASM)  # fmt: skip
                    product1 = tl.dot(left, right, product1, input_precision="ieee", out_dtype=kind)
                if PLANES > 2:
                    left = _left(packed2, zero, where + 2 * m * groups, right, part * together + i, EXACT, OFFSET, BITS,
                                 HAS_ZERO, ASM)  # fmt: skip
                    product2 = tl.dot(left, right, product2, input_precision="ieee", out_dtype=kind)
            value = _scaled(product0, sum_x, scale, zero, where, EXACT, OFFSET, HAS_ZERO)
            if PLANES > 1:
                value += _scaled(product1, sum_x, scale, zero, where + m * groups, EXACT, OFFSET, HAS_ZERO)
            if PLANES > 2:
                value += _scaled(product2, sum_x, scale, zero, where + 2 * m * groups, EXACT, OFFSET, HAS_ZERO)
            if not EXACT:
                value *= tl.load(scales + token * chunks + start // 128, mask=known, other=0.0)[None, :]
            total += value
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < m, other=0.0).to(tl.float32)[:, None]
    target = out + tl.program_id(1).to(tl.int64) * tokens * m + row[:, None] + (token * m)[None, :]
    tl.store(target, total, mask=(row < m)[:, None] & known[None, :])


@triton.jit
def _left(
    packed, zero, where, right, FIELD: tl.constexpr,
    EXACT: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The left operand (ROWS, RUN): int8 codes as they are, or with ``EXACT`` codes minus zeros in the dtype of x."""
    if not EXACT:
        return byte_field(packed, BITS, FIELD, ASM)
    code = float_field(packed, BITS, FIELD, OFFSET, right.dtype, ASM)
    if HAS_ZERO:
        code -= (tl.load(zero + where).to(tl.int32) - OFFSET).to(tl.float32).to(right.dtype)[:, None]
    return code


@triton.jit
def _scaled(product, sum_x, scale, zero, where, EXACT: tl.constexpr, OFFSET: tl.constexpr, HAS_ZERO: tl.constexpr):
    factor = tl.load(scale + where).to(tl.float32)[:, None]
    if EXACT:
        return product * factor
    if HAS_ZERO:
        return (product - tl.load(zero + where).to(tl.int32)[:, None] * sum_x[None, :]).to(tl.float32) * factor
    return (product - (OFFSET * sum_x)[None, :]).to(tl.float32) * factor
