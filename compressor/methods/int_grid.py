"""Grids of integers: which values a group of weights can take, and the search for the grid that fits it best.

value = (code - zero) * scale, -2^(b-1) <= code < 2^(b-1). Symmetric grids have zero = 0, so that one end reaches a step
further than the other; a negative scale turns that end to where the larger weights are, and costs no byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.formats.group_int import portable_scale

FACTORS = tuple(1.15 - 0.05 * step for step in range(18))
"""Multiples of the largest weight's scale that are tried: from a little beyond to 0.3 of it."""


@dataclass(frozen=True)
class IntGrid:
    """One grid for each of many groups.

    Attributes:
        scale: (...) fp32, portable (see `compressor.formats.group_int`), of either sign.
        zero: (...) fp32, integers in the range of the codes, or None for 0.
        bits: 2 to 8.
    """

    scale: Tensor
    zero: Tensor | None
    bits: int

    def offsets(self, w: Tensor) -> Tensor:
        """Return code - zero (fp32) of the values nearest to ``w``, whose last dimensions are those of ``scale``."""
        return self.round_(w / self.scale)

    def round_(self, steps: Tensor) -> Tensor:
        """Overwrite ``steps``, weights in units of their scale, by the nearest offsets there are, and return it."""
        top = 2.0 ** (self.bits - 1)
        steps.round_()
        if self.zero is None:
            return steps.clamp_(-top, top - 1)
        return torch.clamp(steps, -top - self.zero, top - 1 - self.zero, out=steps)

    def snap(self, w: Tensor) -> Tensor:
        """Return the values nearest to ``w``."""
        return self.offsets(w).mul_(self.scale)

    def __getitem__(self, c: int) -> IntGrid:
        """Return the ``c``-th of several grids for each group."""
        return IntGrid(self.scale[c], None if self.zero is None else self.zero[c], self.bits)

    def gather(self, index: Tensor) -> IntGrid:
        """Return, of several grids (c, m) for each of m groups, those of ``index`` (k, m) int64."""
        return IntGrid(
            self.scale.gather(0, index), None if self.zero is None else self.zero.gather(0, index), self.bits
        )

    def flat(self) -> IntGrid:
        """Return all grids in one row."""
        return IntGrid(self.scale.view(-1), None if self.zero is None else self.zero.view(-1), self.bits)


def candidate_grids(
    X: Tensor, bits: int, *, asymmetric: bool, clip: bool, factors: Sequence[float] = FACTORS, signs: bool = True
) -> IntGrid:
    """Return the grids (c, m) that are worth trying for m groups of weights, ``X`` (w, m) fp32, one group a column.

    Without ``clip`` the one that reaches the largest weight (for symmetric grids half a step beyond the last code, as
    compressed-tensors has it). A group of zeros gets the smallest scale. With it, multiples of that by ``factors``, and
    for symmetric grids the negative ones too where ``signs`` says so.
    """
    sizes = torch.tensor(factors if clip else (1.0,), dtype=X.dtype, device=X.device)[:, None]
    if not asymmetric:
        scale = sizes * (X.abs().amax(0) * 2 / (2**bits - 1))
        return IntGrid(portable_scale(torch.cat([scale, -scale]) if clip and signs else scale, bits), None, bits)
    low, high = X.amin(0).clamp(max=0), X.amax(0).clamp(min=0)
    scale = portable_scale(sizes * ((high - low) / (2**bits - 1)), bits)
    first = -(2.0 ** (bits - 1))
    zero = (first - low * sizes / scale).round_().clamp_(first, -first - 1)
    return IntGrid(scale, zero, bits)


def grid_errors(X: Tensor, grids: IntGrid, importance: Tensor | None = None) -> Tensor:
    """Return (c, m): sum over a group, ``X`` (w, m), of squared rounding errors, weighted by ``importance`` (w,)."""
    errors = []
    for c in range(len(grids.scale)):
        squares = (X - grids[c].snap(X)).square_()
        errors.append((squares if importance is None else squares.mul_(importance[:, None])).sum(0))
    return torch.stack(errors)


def best_grids(X: Tensor, grids: IntGrid, keep: int, importance: Tensor | None = None) -> IntGrid:
    """Return the ``keep`` grids (k, m) of least `grid_errors`, the best first; ties go to the first candidate."""
    if len(grids.scale) <= 1:
        return grids
    order = torch.sort(grid_errors(X, grids, importance), dim=0, stable=True).indices
    return grids.gather(order[:keep])
