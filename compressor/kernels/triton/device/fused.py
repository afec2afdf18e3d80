# mypy: ignore-errors
# (Triton's language is not Python's: constexpr parameters are no types, and kernels return nothing that has one)
"""One token, its activations rounded by every program for itself: one launch where `gemv` needs two."""

from __future__ import annotations

import triton
import triton.language as tl

from compressor.kernels.triton.device.common import dot4, word_field


@triton.jit
def _activations(x, column, n, FIELD: tl.constexpr, RUN: tl.constexpr, FOURS: tl.constexpr):
    """The activations (WORDS, 4) that meet one field of words. ``FOURS``: four divides n."""
    at = (column // (RUN // 4)) * 128 + FIELD * RUN + (column % (RUN // 4)) * 4
    inputs = at[:, None] + tl.arange(0, 4)[None, :]
    inside = at[:, None] < n if FOURS else inputs < n
    return tl.load(x + inputs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _in_words(value, inverse):
    """int8 codes, four to a word: value (WORDS, 4) times inverse (WORDS,), to the nearest, halves to even."""
    code = (value * inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True) & 255  # 1.5 * 2^23: an integer is left
    return tl.sum(code << (8 * tl.arange(0, 4))[None, :], axis=1)


@triton.jit
def fused_kernel(
    x, words, scale, zero, bias, out, m, n, chunks, groups, steps,
    GROUP: tl.constexpr, OFFSET: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr,
    FOURS: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """One program: ``ROWS`` outputs. x (n,) any float; blocks of 128 inputs, each in one group; else as `gemv_kernel`.

    out (m,). The result is that of `gemv_kernel` but for the order of a sum.
    """
    fields: tl.constexpr = 8 // BITS
    blocks: tl.constexpr = WORDS * 4 // RUN
    pieces: tl.constexpr = RUN // 16  # of four words, in a block
    width = chunks * (RUN // 4)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(row, m - 1).to(tl.int64)
    total = tl.zeros([ROWS, WORDS // 4], tl.float32)
    for step in range(steps):
        column = step * WORDS + tl.arange(0, WORDS)
        value0 = _activations(x, column, n, 0, RUN, FOURS)
        most = tl.abs(value0)
        bad = ~(most < float("inf"))
        if fields > 1:
            value1 = _activations(x, column, n, 1, RUN, FOURS)
            most = tl.maximum(most, tl.abs(value1))
            bad = bad | ~(tl.abs(value1) < float("inf"))
        if fields > 2:
            value2 = _activations(x, column, n, 2, RUN, FOURS)
            value3 = _activations(x, column, n, 3, RUN, FOURS)
            most = tl.maximum(most, tl.maximum(tl.abs(value2), tl.abs(value3)))
            bad = bad | ~(tl.abs(value2) < float("inf")) | ~(tl.abs(value3) < float("inf"))
        most = tl.max(tl.reshape(tl.where(bad, float("inf"), most), [blocks, RUN]), axis=1)
        usual = (most > 1e-30) & (most < float("inf"))
        inverse = tl.where(usual, 127.0 / most, 0.0)
        factor = tl.where(usual, most / 127.0, tl.where(most < float("inf"), 0.0, float("nan")))
        inverse = tl.reshape(tl.broadcast_to(inverse[:, None], [blocks, RUN // 4]), [WORDS])
        factor = tl.reshape(tl.broadcast_to(factor[:, None], [blocks, pieces]), [WORDS // 4])
        ones = tl.full([WORDS], 0x01010101, tl.int32)
        word0 = _in_words(value0, inverse)
        sums = dot4(ones, word0, tl.zeros([WORDS], tl.int32), False, ASM)
        if fields > 1:
            word1 = _in_words(value1, inverse)
            sums = dot4(ones, word1, sums, False, ASM)
        if fields > 2:
            word2 = _in_words(value2, inverse)
            word3 = _in_words(value3, inverse)
            sums = dot4(ones, word3, dot4(ones, word2, sums, False, ASM), False, ASM)
        sums = tl.sum(tl.reshape(sums, [WORDS // 4, 4]), axis=1)
        block = step * blocks + tl.arange(0, WORDS // 4) // pieces
        valid = block < chunks
        for plane in tl.static_range(PLANES):
            here = plane * m + inside
            data = tl.load(words + (here * width)[:, None] + column[None, :], mask=column[None, :] < width, other=0)
            product = dot4(word_field(data, BITS, 0), tl.broadcast_to(word0[None, :], [ROWS, WORDS]),
                           tl.zeros([ROWS, WORDS], tl.int32), BITS == 8, ASM)  # fmt: skip
            if fields > 1:
                product = dot4(word_field(data, BITS, 1), tl.broadcast_to(word1[None, :], [ROWS, WORDS]), product,
                               BITS == 8, ASM)  # fmt: skip
            if fields > 2:
                product = dot4(word_field(data, BITS, 2), tl.broadcast_to(word2[None, :], [ROWS, WORDS]), product,
                               BITS == 8, ASM)  # fmt: skip
                product = dot4(word_field(data, BITS, 3), tl.broadcast_to(word3[None, :], [ROWS, WORDS]), product,
                               BITS == 8, ASM)  # fmt: skip
            quad = tl.sum(tl.reshape(product, [ROWS, WORDS // 4, 4]), axis=2)
            where = (here * groups)[:, None] + tl.minimum(block * 128 // GROUP, groups - 1)[None, :]
            grid = tl.load(scale + where, mask=valid[None, :], other=0.0).to(tl.float32)
            origin = OFFSET
            if HAS_ZERO:
                origin = tl.load(zero + where, mask=valid[None, :], other=0).to(tl.int32)
            total += (quad - origin * sums[None, :]).to(tl.float32) * (grid * factor[None, :])
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row < m, other=0.0).to(tl.float32)
    tl.store(out + row, result, mask=row < m)
