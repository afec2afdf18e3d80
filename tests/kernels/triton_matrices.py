"""Packed matrices of every kind that the GPU kernels take, and what a product with them should be."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.formats.group_int import GroupInt, portable_scale
from compressor.formats.partial_binary import PartialBinary
from compressor.formats.trit_planes import TritPlanes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

needs_triton = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED),
    reason="run by test_triton_interpreted.py in a process of its own"
    if HAS_TRITON
    else "the package triton is not installed (pip install triton)",
)


def trits(m: int, n: int, *, planes: int = 2, group: int = 128, seed: int = 0) -> TritPlanes:
    """Random trit planes (m, n)."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(-1, 2, (planes, m, n), generator=g, dtype=torch.int8)
    return TritPlanes(values, torch.rand(planes, m, -(-n // group), generator=g).half(), group)


def integers(m: int, n: int, *, bits: int = 4, group: int = 128, zeros: bool = False, seed: int = 0) -> GroupInt:
    """Random group integers (m, n), scales of either sign."""
    g = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (m, n), generator=g).to(torch.int8)
    scale = portable_scale(torch.randn(m, n // group, generator=g) / high, bits)
    zero = torch.randint(low, high, (m, n // group), generator=g).to(torch.int8) if zeros else None
    return GroupInt(codes, scale, zero, bits)


def signs(
    m: int, n: int, *, group: int = 128, share: float = 0.1, mean: bool = True, zeros: bool = True,
    by_input: bool = False, bits: int = 8, seed: int = 0,
) -> PartialBinary:  # fmt: skip
    """Random signs with salient weights (m, n)."""
    g = torch.Generator().manual_seed(seed)
    groups = -(-n // group)
    shape = (1, n) if by_input else (m, n)
    salient = (torch.rand(shape, generator=g) < share).expand(m, n).contiguous()
    step = torch.rand(1, n, generator=g).half() * salient[:1] if by_input else torch.rand(m, 1, generator=g).half()
    return PartialBinary(
        (torch.rand(m, n, generator=g) < 0.5) & ~salient,
        torch.rand(m, groups, generator=g).half(),
        torch.randn(m, groups, generator=g).half() if mean else None,
        salient,
        torch.randint(0, 2**bits, (m, n), generator=g, dtype=torch.uint8) * salient,
        step,
        torch.randint(0, 2**bits, (m,), generator=g, dtype=torch.uint8) if zeros else None,
        bits,
        group,
    )


def stored(
    matrix: TritPlanes | GroupInt | PartialBinary, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its (parts, spec), the unpacked matrix in ``dtype``."""
    parts = matrix.parts(dtype) if isinstance(matrix, GroupInt) else matrix.parts()
    return parts, matrix.spec(dtype)


def rounded_activations(x: Tensor) -> Tensor:
    """What int8 with a scale for every 128 inputs leaves of x (tokens, n), in fp64: slowly, and in plain words."""
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for start in range(0, x.shape[1], 128):
            part = x[token, start : start + 128].float()
            most = part.abs().max()
            if most > 0:
                codes = (part * (127 / most)).round()  # halves to even
                result[token, start : start + 128] = codes.double() * (most / 127).double()
    return result


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, against the largest expected value."""
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max())
