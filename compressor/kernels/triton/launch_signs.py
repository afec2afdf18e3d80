"""Calls of the kernels for signs with salient weights. Importing this needs ``triton``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compressor.kernels.triton.device.common import interpreted
from compressor.kernels.triton.device.signs import signs_kernel
from compressor.kernels.triton.launch import WHOLE_ROW, or_other, quantize
from compressor.kernels.triton.layouts import ACTIVATION_GROUP
from compressor.kernels.triton.sparse_signs import SIGN_RUN, SparseSigns
from compressor.kernels.triton.tiles import SIGNS_TOKENS, Tile, signs_tile


def signs_linear(
    x: Tensor, signs: SparseSigns, bias: Tensor | None, *, exact: bool, tile: Sequence[int] = ()
) -> Tensor:
    """Return x W^T + bias for a partially binarized W; the arguments are those of `launch.linear`.

    Salient weights meet activations as they are in either mode. Stages and splits of ``tile`` are not used. Above a few
    tokens the matrix is unpacked, by torch.
    """
    flat = x.reshape(-1, signs.n)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    if flat.shape[0] > SIGNS_TOKENS:
        out = F.linear(flat, signs.dense().to(x.dtype), bias)
    else:
        out = _gemv(flat, signs, bias, exact, Tile(*tile) if tile else None)
    return out.view(*x.shape[:-1], signs.m)


def _gemv(x: Tensor, signs: SparseSigns, bias: Tensor | None, exact: bool, tile: Tile | None) -> Tensor:
    tokens, m, chunks, span = x.shape[0], signs.m, signs.words.shape[1] // 4, span_of_signs(signs)
    out = x.new_empty(tokens, m)
    if tokens == 0:
        return out
    tile = tile or signs_tile(m, chunks * 4, exact)
    codes, scales, sums = (x, x, x) if exact else quantize(x, chunks * ACTIVATION_GROUP, span)
    signs_kernel[(-(-m // tile.rows), tokens)](
        x, codes if exact else codes.view(signs.words.dtype), scales, sums, signs.words, signs.scale, signs.low,
        signs.entries, signs.starts, signs.step, or_other(signs.zero, x), or_other(bias, x), out,
        m, signs.n, x.stride(0), chunks, signs.scale.shape[1], -(-chunks * 4 // tile.words),
        EXACT=exact, GROUP=WHOLE_ROW if signs.group >= signs.n else signs.group, SPAN=span, ROWS=tile.rows,
        WORDS=tile.words, ENTRIES=32 * tile.warps, HAS_ZERO=signs.zero is not None, MIDDLE=signs.middle,
        BY_INPUT=signs.by_input, HAS_BIAS=bias is not None, ASM=not interpreted(), num_warps=tile.warps,
    )  # fmt: skip
    return out


def span_of_signs(signs: SparseSigns) -> int:
    """Return how many inputs are multiplied before scales are applied: at most 128, all in one group."""
    span = SIGN_RUN
    while span < ACTIVATION_GROUP and (signs.group >= signs.n or signs.group % (2 * span) == 0):
        span *= 2
    return span
