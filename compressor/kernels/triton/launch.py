"""Calls of the kernels: grids, workspaces, the choice by the number of tokens. Importing this needs ``triton``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compressor.kernels.triton.device.dense import dense_kernel, reduce_kernel
from compressor.kernels.triton.device.gemm import gemm_kernel
from compressor.kernels.triton.device.gemv import gemv_kernel
from compressor.kernels.triton.device.quantize import quantize_kernel
from compressor.kernels.triton.device.signs import signs_kernel
from compressor.kernels.triton.layouts import ACTIVATION_GROUP, Planes
from compressor.kernels.triton.sparse_signs import SIGN_RUN, SparseSigns
from compressor.kernels.triton.tiles import (
    GEMM_TOKENS,
    GEMV_TOKENS,
    SIGNS_TOKENS,
    Tile,
    gemm_tile,
    gemv_tile,
    token_columns,
)

LANGUAGE_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
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


def linear(
    x: Tensor, planes: Planes, bias: Tensor | None, *, exact: bool, tile: Sequence[int] = (), assembly: bool = True
) -> Tensor:
    """Return x W^T + bias.

    Args:
        x: (..., n) fp32, fp16 or bf16.
        planes: W (m, n), on the device of x.
        bias: (m,) or None.
        exact: multiply activations as they are by values as they would be unpacked; otherwise activations are rounded
            to int8 where that is faster (up to 64 tokens).
        tile: the numbers of a `Tile`, in place of the table's.
        assembly: whether instructions may be written out that Triton has no words for.

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
        out = F.linear(flat, dense(planes, x.dtype, assembly=assembly), bias)
    elif exact:
        out = gemm(flat, planes, bias, chosen, exact=True, assembly=assembly)
    elif tokens <= GEMV_TOKENS:
        out = gemv(flat, planes, bias, chosen, assembly=assembly)
    else:
        out = gemm(flat, planes, bias, chosen, assembly=assembly)
    return out.view(*x.shape[:-1], planes.m)


def signs_linear(
    x: Tensor, signs: SparseSigns, bias: Tensor | None, *, exact: bool, tile: Sequence[int] = (), assembly: bool = True
) -> Tensor:
    """Return x W^T + bias for a partially binarized W; the arguments are those of `linear`.

    Salient weights meet activations as they are in either mode. Of ``tile`` stages and splits are not used. Above a few
    tokens the matrix is unpacked.
    """
    flat = x.reshape(-1, signs.n)
    tokens, m, (chunks, span) = flat.shape[0], signs.m, (signs.words.shape[1] // 4, _signs_span(signs))
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    if tokens > SIGNS_TOKENS:
        return F.linear(flat, signs.dense().to(x.dtype), bias).view(*x.shape[:-1], m)
    out = flat.new_empty(tokens, m)
    if tokens:
        chosen = Tile(*tile) if tile else gemv_tile(m, chunks * 4)
        codes, scales, sums = (flat, flat, flat) if exact else quantize(flat, chunks * ACTIVATION_GROUP, span)
        signs_kernel[(-(-m // chosen.rows), tokens)](
            flat, codes if exact else codes.view(torch.int32), scales, sums, signs.words, signs.scale,
            _or(signs.mean, x), _or(signs.entries, x), signs.starts, signs.step, _or(signs.zero, x), _or(bias, x), out,
            m, signs.n, flat.stride(0), chunks, signs.scale.shape[1], -(-chunks * 4 // chosen.words),
            EXACT=exact, GROUP=WHOLE_ROW if signs.group >= signs.n else signs.group, SPAN=span, ROWS=chosen.rows,
            WORDS=chosen.words, ENTRIES=32 * chosen.warps, HAS_MEAN=signs.mean is not None,
            HAS_ZERO=signs.zero is not None, MIDDLE=signs.middle, BY_INPUT=signs.by_input, HAS_BIAS=bias is not None,
            ASM=assembly, num_warps=chosen.warps,
        )  # fmt: skip
    return out.view(*x.shape[:-1], m)


def _signs_span(signs: SparseSigns) -> int:
    span = SIGN_RUN
    while span < ACTIVATION_GROUP and (signs.group >= signs.n or signs.group % (2 * span) == 0):
        span *= 2
    return span


def gemv(x: Tensor, planes: Planes, bias: Tensor | None, tile: Tile | None = None, *, assembly: bool = True) -> Tensor:
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
        codes.view(torch.int32), scales, sums, planes.words, planes.scale, _or(planes.zero, x), _or(bias, x), target,
        m, planes.padded // ACTIVATION_GROUP, planes.scale.shape[2], steps,
        STAGES=tile.stages, TOKENS=tokens, SPAN=span, WORDS=tile.words, ROWS=tile.rows, HAS_BIAS=bias is not None and splits == 1,
        **_constants(planes, assembly), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _reduced(target, bias, x)


def gemm(
    x: Tensor,
    planes: Planes,
    bias: Tensor | None,
    tile: Tile | None = None,
    *,
    exact: bool = False,
    assembly: bool = True,
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
        codes, scales, sums, planes.words.view(torch.uint8), planes.scale, _or(planes.zero, x), _or(bias, x), target,
        m, planes.n, codes.stride(0), planes.padded // ACTIVATION_GROUP, planes.scale.shape[2], tokens, blocks, steps,
        m * width * 4, EXACT=exact, SPAN=span, ROWS=tile.rows, TOKENS=token_columns(tokens),
        HAS_BIAS=bias is not None and splits == 1, **_constants(planes, assembly),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _reduced(target, bias, x)


def dense(planes: Planes, dtype: torch.dtype, *, assembly: bool = True) -> Tensor:
    """Return the matrix (m, n) in ``dtype``, rounded to the dtype of the spec before."""
    m, width = planes.words.shape[1:]
    blocks, rows = width * 4 // planes.run, 32
    out = torch.empty(m, planes.n, dtype=dtype, device=planes.words.device)
    dense_kernel[(-(-m // rows), blocks)](
        planes.words.view(torch.uint8), planes.scale, _or(planes.zero, out), out,
        m, planes.n, planes.scale.shape[2], blocks, m * width * 4,
        ROUND=LANGUAGE_DTYPES[planes.dtype], ROWS=rows, **_constants(planes, assembly), num_warps=4,
    )  # fmt: skip
    return out


def _constants(planes: Planes, assembly: bool) -> dict[str, Any]:
    return {
        "GROUP": WHOLE_ROW if planes.group >= planes.n else planes.group,
        "OFFSET": planes.offset,
        "PLANES": planes.words.shape[0],
        "BITS": planes.bits,
        "RUN": planes.run,
        "HAS_ZERO": planes.zero is not None,
        "ASM": assembly,
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
        partial, _or(bias, x), out, m, tokens, SPLITS=splits, ROWS=rows, HAS_BIAS=bias is not None, num_warps=4
    )
    return out


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor  # a pointer that is not read


def interpreted() -> bool:
    """Return whether kernels are run by Triton's interpreter, on tensors of any device, with no assembly."""
    return bool(triton.knobs.runtime.interpret)
