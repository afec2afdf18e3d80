# mypy: ignore-errors
# (Triton's language is not Python's: constexpr parameters are no types, and kernels return nothing that has one)
"""One token, or two: products of four bytes at once (dp4a) on raw codes, scales once every 64 codes of a thread."""

from __future__ import annotations

import triton
import triton.language as tl

from compressor.kernels.triton.device.common import dot4, word_field


@triton.jit
def _piece(
    words, x, sums, scales, token, step, zero, scale, valid, block, piece, total,
    chunks, SET: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr, SPAN: tl.constexpr,
    WORDS: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``total`` fp32 (ROWS, WORDS / 4), plus the products of one set of fields that share their scales."""
    fields: tl.constexpr = 8 // BITS
    together: tl.constexpr = SPAN // RUN
    column = step * WORDS + tl.arange(0, WORDS)
    inside = (column // (RUN // 4)) * (fields * RUN // 4) + column % (RUN // 4)
    product = tl.zeros([ROWS, WORDS], tl.int32)
    for i in tl.static_range(together):
        at = x + token * chunks * 32 + inside + (SET * together + i) * (RUN // 4)
        four = tl.load(at, mask=inside < chunks * 32, other=0)
        codes = word_field(words, BITS, SET * together + i)
        product = dot4(codes, tl.broadcast_to(four[None, :], [ROWS, WORDS]), product, BITS == 8, ASM)
    quad = tl.sum(tl.reshape(product, [ROWS, WORDS // 4, 4]), axis=2)
    start = block * (fields * RUN) + SET * SPAN
    # the sum of the activations counts once for a span: at the first of its pieces of four words
    sum_x = tl.load(sums + token * chunks * (128 // SPAN) + start // SPAN, mask=valid & (piece == 0), other=0)
    scale_x = tl.load(scales + token * chunks + start // 128, mask=valid, other=0.0)
    return total + (quad - zero * sum_x[None, :]).to(tl.float32) * (scale * scale_x[None, :])


@triton.jit
def gemv_kernel(
    x, scales, sums, words, scale, zero, bias, out,
    m, chunks, groups, steps,
    GROUP: tl.constexpr, OFFSET: tl.constexpr, TOKENS: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr,
    RUN: tl.constexpr, SPAN: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: ``ROWS`` outputs, ``steps`` times ``WORDS`` words of each.

    x int32 (tokens, 32 chunks): four int8 each; scales fp32 (tokens, chunks); sums int32 (tokens, 128 chunks / SPAN).
    words int32 (PLANES, m, chunks * BITS * 4), scale (PLANES, m, groups), zero int8 likewise.
    out (splits, tokens, m): fp32 and without bias where there are several splits.
    """
    fields: tl.constexpr = 8 // BITS
    width = chunks * (128 // fields // 4)  # words of a row
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(row, m - 1).to(tl.int64)  # rows beyond the last compute it again, and are not stored
    column = tl.arange(0, WORDS)
    total0 = tl.zeros([ROWS, WORDS // 4], tl.float32)
    if TOKENS > 1:
        total1 = tl.zeros([ROWS, WORDS // 4], tl.float32)
    first = tl.program_id(1) * steps
    for step in tl.range(first, first + steps, num_stages=STAGES):
        at = step * (WORDS // 4) + tl.arange(0, WORDS // 4)  # pieces of four words
        block = at // (RUN // 16)
        piece = at % (RUN // 16)
        valid = at < width // 4
        for plane in tl.static_range(PLANES):
            here = plane * m + inside
            data = tl.load(
                words + (here * width)[:, None] + (step * WORDS + column)[None, :],
                mask=(step * WORDS + column)[None, :] < width, other=0,
            )  # fmt: skip
            for part in tl.static_range(fields * RUN // SPAN):
                grid = tl.minimum((block * (fields * RUN) + part * SPAN) // GROUP, groups - 1)
                where = (here * groups)[:, None] + grid[None, :]
                factor = tl.load(scale + where, mask=valid[None, :], other=0.0).to(tl.float32)
                origin = OFFSET
                if HAS_ZERO:
                    origin = tl.load(zero + where, mask=valid[None, :], other=0).to(tl.int32)
                total0 = _piece(data, x, sums, scales, 0, step, origin, factor, valid, block, piece, total0,
                                chunks, part, BITS, RUN, SPAN, WORDS, ROWS, ASM)  # fmt: skip
                if TOKENS > 1:
                    total1 = _piece(data, x, sums, scales, 1, step, origin, factor, valid, block, piece, total1,
                                    chunks, part, BITS, RUN, SPAN, WORDS, ROWS, ASM)  # fmt: skip
    target = out + (tl.program_id(1) * TOKENS).to(tl.int64) * m + row
    added = tl.zeros([ROWS], tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + row, mask=row < m, other=0.0).to(tl.float32)
    tl.store(target, tl.sum(total0, axis=1) + added, mask=row < m)
    if TOKENS > 1:
        tl.store(target + m, tl.sum(total1, axis=1) + added, mask=row < m)
