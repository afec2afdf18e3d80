"""Calls of the kernels: grids, workspaces, the choice by the number of tokens. Importing this needs ``triton``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compressor.kernels.triton.device.common import LANGUAGE_DTYPES, interpreted
from compressor.kernels.triton.device.dense import dense_kernel, reduce_kernel
from compressor.kernels.triton.device.fused import fused_kernel
from compressor.kernels.triton.device.gemm import gemm_kernel
from compressor.kernels.triton.device.gemv import gemv_kernel
from compressor.kernels.triton.device.quantize import quantize_kernel
from compressor.kernels.triton.layouts import ACTIVATION_GROUP, Planes
from compressor.kernels.triton.tiles import (
    FUSED_WEIGHTS,
    GEMM_TOKENS,
    GEMV_TOKENS,
    Tile,
    fused_tile,
    gemm_tile,
    gemv_tile,
    token_columns,
)

WHOLE_ROW = 1 << 30
"""Stands for a group of all inputs: kernels are compiled anew for every group, and need not be for every width."""


def quantize(x: Tensor, padded: int, span: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round activations to int8.

    Args:
        x: (tokens, n) float, the inputs of a token one after the other.
        padded: n, rounded up to a multiple of 128 or more.
        span: inputs whose codes are summed: 16 to 128, a power of two.

    Returns:
        codes int8 (tokens, padded), 0 beyond n; scales fp32 (tokens, padded / 128), NaN where a value of the 128 is not
        finite; sums of codes int32 (tokens, padded / span).
    """
    tokens, n = x.shape
    chunks = padded // ACTIVATION_GROUP
    codes = torch.empty(tokens, padded, dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, chunks, dtype=torch.float32, device=x.device)
    sums = torch.empty(tokens, padded // span, dtype=torch.int32, device=x.device)
    at_once = 4
    quantize_kernel[(tokens, -(-chunks // at_once))](
        x, codes, scales, sums, n, x.stride(0), chunks, CHUNKS=at_once, SPAN=span, num_warps=4
    )
    return codes, scales, sums


def span_of(planes: Planes) -> int:
    """Return how many inputs are multiplied before scales are applied: at most 128, all in one group and block."""
    span = planes.run
    block = planes.run * 8 // planes.bits
    while 2 * span <= min(ACTIVATION_GROUP, block) and (planes.group >= planes.n or planes.group % (2 * span) == 0):
        span *= 2
    return span


def linear(x: Tensor, planes: Planes, bias: Tensor | None, *, exact: bool, tile: Sequence[int] = ()) -> Tensor:
    """Return x W^T + bias.

    Args:
        x: (..., n) fp32, fp16 or bf16.
        planes: W (m, n), on the device of x.
        bias: (m,) or None.
        exact: leave activations as they are. Otherwise up to 64 tokens are rounded to int8. In either mode up to 64
            tokens meet codes, and scales in fp32; more of them meet values rounded to the dtype of the spec.
        tile: the numbers of a `Tile`, in place of the table's.

    Returns:
        (..., m) in the dtype of x. A token with an activation that is NaN or infinite gets outputs that are not finite
        (all NaN where activations are rounded); no other token is touched.
    """
    flat = x.reshape(-1, planes.n)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    tokens, chosen = flat.shape[0], Tile(*tile) if tile else None
    if tokens == 0:
        out = flat.new_empty(0, planes.m)
    elif tokens > GEMM_TOKENS:
        out = F.linear(flat, dense(planes, x.dtype), bias)
    elif exact:
        out = gemm(flat, planes, bias, chosen, exact=True)
    elif tokens == 1 and planes.m * planes.n <= FUSED_WEIGHTS and fusible(planes):
        out = fused_gemv(flat, planes, bias, chosen)
    elif tokens <= GEMV_TOKENS:
        out = gemv(flat, planes, bias, chosen)
    else:
        out = gemm(flat, planes, bias, chosen)
    return out.view(*x.shape[:-1], planes.m)


def gemv(x: Tensor, planes: Planes, bias: Tensor | None, tile: Tile | None = None) -> Tensor:
    """Return x W^T + bias for one or two tokens, x (tokens, n) rounded to int8."""
    tokens, m, width = x.shape[0], planes.m, planes.words.shape[2]
    span = span_of(planes)
    codes, scales, sums = quantize(x, planes.padded, span)
    tile = tile or gemv_tile(m, width)
    all_steps = -(-width // tile.words)
    steps = -(-all_steps // tile.splits)
    splits = -(-all_steps // steps)
    target = _target(x, m, splits)
    grid = (-(-m // tile.rows), splits)
    gemv_kernel[grid](
        codes.view(torch.int32), scales, sums, planes.words, planes.scale, or_other(planes.zero, x), or_other(bias, x),
        target, m, planes.padded // ACTIVATION_GROUP, planes.scale.shape[2], steps,
        STAGES=tile.stages, TOKENS=tokens, SPAN=span, WORDS=tile.words, ROWS=tile.rows,
        HAS_BIAS=bias is not None and splits == 1, **_constants(planes), num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return _reduced(target, bias, x)


def fusible(planes: Planes) -> bool:
    """Return whether `fused_gemv` takes a layout: its blocks must be those of the scales of activations."""
    return planes.run * 8 // planes.bits == ACTIVATION_GROUP == span_of(planes)


def fused_gemv(x: Tensor, planes: Planes, bias: Tensor | None, tile: Tile | None = None) -> Tensor:
    """Return x W^T + bias for one token, x (1, n): `gemv` in one launch, at the price of more instructions."""
    m, width = planes.m, planes.words.shape[2]
    tile = tile or fused_tile(m, width)
    target = x.new_empty(1, m)
    fused_kernel[(-(-m // tile.rows),)](
        x, planes.words, planes.scale, or_other(planes.zero, x), or_other(bias, x), target,
        m, planes.n, planes.padded // ACTIVATION_GROUP, planes.scale.shape[2], -(-width // tile.words),
        FOURS=planes.n % 4 == 0, WORDS=tile.words, ROWS=tile.rows, HAS_BIAS=bias is not None, **_constants(planes),
        num_warps=tile.warps,
    )  # fmt: skip
    return target


def gemm(
    x: Tensor,
    planes: Planes,
    bias: Tensor | None,
    tile: Tile | None = None,
    *,
    exact: bool = False,
) -> Tensor:
    """Return x W^T + bias by tensor cores, x (tokens, n) rounded to int8, or with ``exact`` as it is."""
    tokens, (m, width) = x.shape[0], planes.words.shape[1:]
    span, blocks = span_of(planes), width * 4 // planes.run
    codes, scales, sums = (x, x, x) if exact else quantize(x, planes.padded, span)
    tile = tile or gemm_tile(m, blocks, tokens)
    steps = -(-blocks // tile.splits)
    splits = -(-blocks // steps)
    target = _target(x, m, splits)
    gemm_kernel[(-(-m // tile.rows), splits, -(-tokens // token_columns(tokens)))](
        codes, scales, sums, planes.words.view(torch.uint8), planes.scale, or_other(planes.zero, x),
        or_other(bias, x), target, m, planes.n, codes.stride(0), planes.padded // ACTIVATION_GROUP,
        planes.scale.shape[2], tokens, blocks, steps, m * width * 4,
        EXACT=exact, SPAN=span, ROWS=tile.rows, TOKENS=token_columns(tokens),
        HAS_BIAS=bias is not None and splits == 1, **_constants(planes),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _reduced(target, bias, x)


def dense(planes: Planes, dtype: torch.dtype) -> Tensor:
    """Return the matrix (m, n) in ``dtype``, rounded to the dtype of the spec before."""
    m, width = planes.words.shape[1:]
    blocks, rows = width * 4 // planes.run, 32
    out = torch.empty(m, planes.n, dtype=dtype, device=planes.words.device)
    dense_kernel[(-(-m // rows), blocks)](
        planes.words.view(torch.uint8), planes.scale, or_other(planes.zero, out), out,
        m, planes.n, planes.scale.shape[2], blocks, m * width * 4,
        ROUND=LANGUAGE_DTYPES[planes.dtype], ROWS=rows, **_constants(planes), num_warps=4,
    )  # fmt: skip
    return out


def _constants(planes: Planes) -> dict[str, Any]:
    return {
        "GROUP": WHOLE_ROW if planes.group >= planes.n else planes.group,
        "OFFSET": planes.offset,
        "PLANES": planes.words.shape[0],
        "BITS": planes.bits,
        "RUN": planes.run,
        "HAS_ZERO": planes.zero is not None,
        "ASM": not interpreted(),
    }


def _target(x: Tensor, m: int, splits: int) -> Tensor:
    return torch.empty(splits, x.shape[0], m, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)


def _reduced(partial: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    splits, tokens, m = partial.shape
    if splits == 1:
        return partial[0]
    out = torch.empty(tokens, m, dtype=x.dtype, device=x.device)
    rows = 256
    reduce_kernel[(-(-m // rows), tokens)](
        partial, or_other(bias, x), out, m, tokens, SPLITS=splits, ROWS=rows, HAS_BIAS=bias is not None, num_warps=4
    )
    return out


def or_other(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return what stands for a tensor that is not there: a pointer that is not read."""
    return other if tensor is None else tensor
