"""Integers for the salient weights of a row: one grid a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_STEP = 2.0**-24
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


@dataclass(frozen=True)
class Grid:
    """value = (code - zero) * step, code from 0 to 2**bits - 1.

    Attributes:
        step: (r,) fp32, values of fp16.
        zero: (r,) fp32, integers.
        bits: of a code.
    """

    step: Tensor
    zero: Tensor
    bits: int

    def codes(self, value: Tensor) -> Tensor:
        """Return the codes (..., r), fp32 integers, nearest to ``value`` (..., r)."""
        return (value / self.step).round_().add_(self.zero).clamp_(0, 2**self.bits - 1)

    def snap(self, value: Tensor) -> Tensor:
        """Return what the nearest codes stand for."""
        return self.codes(value).sub_(self.zero).mul_(self.step)


def minmax_grid(low: Tensor, high: Tensor, bits: int) -> Grid:
    """Return the grid of rows with values from ``low`` (r,) to ``high`` (r,); 0 is among its values."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    flat = low == high
    low, high = low.masked_fill(flat, -1), high.masked_fill(flat, 1)
    step = ((high - low) / (2**bits - 1)).clamp(SMALLEST_STEP, torch.finfo(torch.float16).max).half().float()
    return Grid(step, (-low / step).round().clamp(0, 2**bits - 1), bits)


def fitted_grid(value: Tensor, salient: Tensor, weight: Tensor, bits: int) -> Grid:
    kept = value.masked_fill(~salient, 0)
    low, high = kept.amin(0), kept.amax(0)
    best = minmax_grid(low, high, bits)
    if bits == 8:
        return best

    def error(grid: Grid) -> Tensor:
        return ((grid.snap(kept) - kept).square_() * weight[:, None]).sum(0)

    least = error(best)
    for shrink in SHRINKS[1:]:
        grid = minmax_grid(low * shrink, high * shrink, bits)
        now = error(grid)
        better = now < least
        least = torch.where(better, now, least)
        best = Grid(torch.where(better, grid.step, best.step), torch.where(better, grid.zero, best.zero), bits)
    return best
