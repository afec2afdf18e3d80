"""Round to nearest (rtn): every weight on its own, on its group's grid. Needs no data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressor.formats.group_int import GroupInt
from compressor.methods.int_grid import best_grids, candidate_grids
from compressor.methods.quantize_settings import GroupIntSettings
from compressor.methods.result import Quantized
from compressor.methods.statistics import InputStatistics

REACH = 2.0**15
"""The largest weight that a portable scale lets a symmetric grid represent."""

CHUNK = 1 << 22
"""Weights rounded at once, so that what the search needs stays small beside the matrix."""


def solve(
    weight: Tensor, stats: InputStatistics | None, settings: GroupIntSettings, frozen: Tensor | None = None
) -> Quantized:
    """Round ``weight`` (m, n) fp32 to integers.

    With ``settings.clip`` the grid of a group is that of least squared error; else the one that reaches its largest
    weight. ``frozen`` (m, n) bool: stays zero. ``stats`` is not looked at.
    """
    m, n = weight.shape
    width = settings.width(n)
    W = weight if frozen is None else weight.masked_fill(frozen, 0)
    codes = torch.empty(m, n, dtype=torch.int8, device=weight.device)
    rows = max(1, CHUNK // max(1, n))
    scales, zeros = [], []
    for start in range(0, m, rows):
        part = slice(start, start + rows)
        X = W[part].reshape(-1, width).T.contiguous()
        grids = candidate_grids(X, settings.bits, asymmetric=settings.asymmetric, clip=settings.clip)
        grid = best_grids(X, grids, 1)[0]
        offsets = grid.offsets(X)
        codes[part] = (offsets if grid.zero is None else offsets + grid.zero).T.reshape(-1, n).to(torch.int8)
        scales.append(grid.scale.view(-1, n // width))
        zeros += [] if grid.zero is None else [grid.zero.view(-1, n // width).to(torch.int8)]
    code = GroupInt(codes, torch.cat(scales), torch.cat(zeros) if zeros else None, settings.bits)
    return Quantized(code, grid_notes(weight, settings))


def foresee(settings: GroupIntSettings, shape: tuple[int, int], dtype: str) -> dict[str, Any]:
    """Return the spec under which a matrix (m, n) = ``shape`` of the dtype of that name will be stored."""
    return {
        "format": "group-int",
        "shape": list(shape),
        "dtype": dtype,
        "bits": settings.bits,
        "group": settings.width(shape[1]),
        "symmetric": not settings.asymmetric,
    }


def grid_notes(weight: Tensor, settings: GroupIntSettings) -> tuple[str, ...]:
    """Return what is unusual about the groups and the range of a quantized ``weight`` (m, n)."""
    notes = []
    n, width = weight.shape[1], settings.width(weight.shape[1])
    if settings.group != "row" and settings.group < n and width != settings.group:
        notes.append(f"groups of {settings.group} do not divide {n} inputs: groups of {width}")
    if (largest := float(weight.abs().max()) if weight.numel() else 0.0) > REACH:
        notes.append(f"weights up to {largest:.4g} are beyond the reach of a grid, about {REACH:g}")
    return tuple(notes)
