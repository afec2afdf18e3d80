# mypy: ignore-errors
# (Triton's language is not Python's: constexpr parameters are no types, and kernels return nothing that has one)
"""One token at a time through signs and salient weights: products of four bytes, then one gather a salient weight."""

from __future__ import annotations

import triton
import triton.language as tl

from compressor.kernels.triton.device.common import dot4, word_field


@triton.jit
def signs_kernel(
    x, codes, scales, sums, words, scale, low, entries, starts, step, zero, bias, out,
    m, n, stride, chunks, groups, steps,
    EXACT: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    ENTRIES: tl.constexpr, HAS_ZERO: tl.constexpr, MIDDLE: tl.constexpr,
    BY_INPUT: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: ``ROWS`` outputs of one token.

    x (tokens, n) any float, ``stride`` between tokens; without ``EXACT`` also codes (as int32), scales and sums of
    `quantize_kernel`. The others as in `SparseSigns`. out (tokens, m).
    """
    together: tl.constexpr = SPAN // 16
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.minimum(row, m - 1).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros([ROWS, WORDS // 4], tl.float32)
    for now in range(steps):
        column = now * WORDS + tl.arange(0, WORDS)
        known = column < chunks * 4
        chunk = now * (WORDS // 4) + tl.arange(0, WORDS // 4)
        valid = chunk < chunks
        data = tl.load(words + (inside * chunks * 4)[:, None] + column[None, :], mask=known[None, :], other=0)
        for part in tl.static_range(128 // SPAN):
            where = (inside * groups)[:, None] + tl.minimum((chunk * 128 + part * SPAN) // GROUP, groups - 1)[None, :]
            size = tl.load(scale + where, mask=valid[None, :], other=0.0).to(tl.float32)
            least = tl.load(low + where, mask=valid[None, :], other=0.0)
            if EXACT:
                plus = tl.zeros([ROWS, WORDS], tl.float32)
                every = tl.zeros([WORDS], tl.float32)
                for i in tl.static_range(together):
                    for byte in tl.static_range(4):
                        at = (column // 4) * 128 + (part * together + i) * 16 + (column % 4) * 4 + byte
                        value = tl.load(x + token * stride + at, mask=at < n, other=0.0).to(tl.float32)
                        bit = (data >> (8 * byte + part * together + i)) & 1
                        plus += tl.where(bit != 0, value[None, :], 0.0)
                        every += value
                sum_plus = tl.sum(tl.reshape(plus, [ROWS, WORDS // 4, 4]), axis=2)
                sum_x = tl.sum(tl.reshape(every, [WORDS // 4, 4]), axis=1)
                total += 2.0 * size * sum_plus + least * sum_x[None, :]
            else:
                product = tl.zeros([ROWS, WORDS], tl.int32)
                for i in tl.static_range(together):
                    at = (column // 4) * 32 + (part * together + i) * 4 + column % 4
                    four = tl.load(codes + token * chunks * 32 + at, mask=known, other=0)
                    bits = word_field(data, 1, part * together + i)
                    product = dot4(bits, tl.broadcast_to(four[None, :], [ROWS, WORDS]), product, False, ASM)
                sum_plus = tl.sum(tl.reshape(product, [ROWS, WORDS // 4, 4]), axis=2).to(tl.float32)
                sum_x = tl.load(sums + token * chunks * (128 // SPAN) + chunk * (128 // SPAN) + part,
                                mask=valid, other=0).to(tl.float32)  # fmt: skip
                scale_x = tl.load(scales + token * chunks + chunk, mask=valid, other=0.0)
                total += (2.0 * size * sum_plus + least * sum_x[None, :]) * scale_x[None, :]
    result = tl.sum(total, axis=1)

    first = tl.load(starts + inside)
    last = tl.load(starts + inside + 1)
    origin = tl.full([ROWS], MIDDLE, tl.float32)
    if HAS_ZERO:
        origin = tl.load(zero + inside).to(tl.float32)
    salient = tl.zeros([ROWS, ENTRIES], tl.float32)
    for begin in range(0, tl.max(last - first, axis=0), ENTRIES):
        index = first[:, None] + begin + tl.arange(0, ENTRIES)[None, :]
        mine = index < last[:, None]
        entry = tl.load(entries + index, mask=mine, other=0)
        at = entry >> 8
        where = (inside * groups)[:, None] + tl.minimum(at // GROUP, groups - 1)
        least = tl.load(low + where, mask=mine, other=0.0)
        if BY_INPUT:
            grid = tl.load(step + at, mask=mine, other=0.0).to(tl.float32)
        else:
            grid = tl.load(step + inside).to(tl.float32)[:, None]
        value = tl.load(x + token * stride + at, mask=mine, other=0.0).to(tl.float32)
        more = ((entry & 255).to(tl.float32) - origin[:, None]) * grid - least
        salient += tl.where(mine, value * more, 0.0)
    result += tl.sum(salient, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row < m, other=0.0).to(tl.float32)
    tl.store(out + token * m + row, result, mask=row < m)
