"""Partial binarization under the Hessian: which weights are salient, which signs the others have, and all their values.

`search_` takes turns (see `binary_fit`); `settle_` makes of the result what can be stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.methods.binary_fit import Rows, descend_, gradient, losses, price, refit_, spread
from compressor.methods.int_grid import IntGrid, best_grids, candidate_grids
from compressor.methods.masks import keep_exactly
from compressor.methods.sweep import Snap
from compressor.methods.threads import matmul

CG_STEPS = 5
POLISH = 2
"""Rounds of descent after everything has been rounded to what can be stored."""

SHRINK = 0.75
"""Power of a row's explained share R^2 by which it is shrunk: what is left of its error then looks less like noise of
the size of the signal, and text of another kind than the calibration's suffers less."""

FINE = 8
"""Bits from which on the grid of the salient weights is as good as none while searching."""


@dataclass(frozen=True)
class SalientGrids:
    """Where salient weights may stand: ``by_input`` one grid for each of the n inputs, otherwise for each of r rows."""

    grid: IntGrid
    by_input: bool

    def snap(self, j: int, w: Tensor) -> Tensor:
        """Return the values nearest to ``w`` (r,) of input ``j``."""
        return (IntGrid(self.grid.scale[j], None, self.grid.bits) if self.by_input else self.grid).snap(w)

    def offsets(self, w: Tensor) -> Tensor:
        """Return the codes, minus that of zero, nearest to ``w`` (n, r)."""
        return self.grid.offsets(w.T).T if self.by_input else self.grid.offsets(w)

    def step(self) -> Tensor:
        """Return the steps in a shape that goes with (n, r)."""
        return self.grid.scale[:, None] if self.by_input else self.grid.scale[None]


def search_(rows: Rows, A: Tensor, *, number: int | None, bits: int, rounds: int, block: int) -> None:
    """Improve ``rows``, all those of a matrix, by ``rounds`` rounds under ``A`` (n, n).

    A round refits values, means and scales, and then moves every weight to its best sign or, with a ``number``, across
    the border of what is salient. That border is one price for the whole matrix: what the last of ``number`` salient
    weights gains. Exactly ``number`` are salient after each round.

    Args:
        number: of salient weights; None leaves them as they are.
        bits: of a salient weight.
        block: inputs whose moves are passed on to the others together.
    """
    for _ in range(rounds):
        refit_(rows, A, CG_STEPS)
        g = gradient(rows, A)
        if number is None:
            descend_(rows, A, g, block=block)
            continue
        grid = None if bits >= FINE else row_grids(rows, A, bits)
        above = _kth_largest(price(rows, A, g, grid), number)
        snap: Snap | None = None if grid is None else SalientGrids(grid, by_input=False).snap
        descend_(rows, A, g, above=above, snap=snap, block=block)
        _recount_(rows, price(rows, A, g), number)
    refit_(rows, A, CG_STEPS)


def _kth_largest(x: Tensor, k: int) -> float:
    return float(x.flatten().kthvalue(x.numel() - k + 1).values) if k else math.inf


def _recount_(rows: Rows, prices: Tensor, number: int) -> None:
    """Make exactly ``number`` weights salient: those too many of least ``prices`` (n, r) become signs, or the
    reverse."""
    surplus = int(torch.count_nonzero(rows.salient)) - number
    if surplus == 0:
        return
    prices = prices.masked_fill(rows.salient, math.inf) if surplus < 0 else prices.masked_fill(~rows.salient, -math.inf)
    chosen = keep_exactly(prices, prices, prices.numel() - number, None)
    nearest = rows.value >= spread(rows.mean, rows.group, len(rows.value))
    rows.plus = torch.where(rows.salient & ~chosen, nearest, rows.plus)
    rows.salient = chosen
    rows.assemble_()


def settle_(rows: Rows, A: Tensor | None, *, bits: int, block: int, by_input: bool = False) -> SalientGrids:
    """Shrink rows that could not be fitted well, round everything to what can be stored, and descend once more.

    Args:
        A: (n, n), or None where there is no data: then rows are not shrunk, and nothing moves after rounding.

    Returns:
        The grids on which the salient weights now stand.
    """
    if A is not None:
        _shrink_(rows, A)
    grids = SalientGrids(_input_grids(rows, bits) if by_input else row_grids(rows, A, bits), by_input)
    rows.mean, rows.scale = half(rows.mean), half(rows.scale)
    rows.value = torch.where(rows.salient, grids.offsets(rows.value) * grids.step(), rows.value)
    rows.assemble_()
    if A is not None:
        g = gradient(rows, A)
        for _ in range(POLISH):
            descend_(rows, A, g, snap=grids.snap, block=block)
    return grids


def _shrink_(rows: Rows, A: Tensor) -> None:
    whole = (rows.target * matmul(A, rows.target)).sum(0, dtype=torch.float64)
    share = torch.where(whole > 0, 1 - losses(rows, A) / whole, 1).clamp(0, 1)
    factor = share.pow(SHRINK).float()
    rows.target, rows.value = rows.target * factor, rows.value * factor
    rows.mean, rows.scale = rows.mean * factor, rows.scale * factor


def row_grids(rows: Rows, A: Tensor | None, bits: int) -> IntGrid:
    """Return the grid (r,) of each row that is best for its salient values, weighted by the diagonal of ``A``."""
    kept = rows.value.masked_fill(~rows.salient, 0)
    candidates = candidate_grids(kept, bits, asymmetric=False, clip=True)
    return best_grids(kept, candidates, 1, None if A is None else A.diagonal())[0]


def _input_grids(rows: Rows, bits: int) -> IntGrid:
    """Return the grid (n,) of each input that is best for its values, where whole inputs are salient."""
    kept = rows.value.masked_fill(~rows.salient, 0).T
    return best_grids(kept, candidate_grids(kept, bits, asymmetric=False, clip=True), 1)[0]


def half(x: Tensor) -> Tensor:
    """Return ``x`` rounded to numbers of fp16, the largest of them where it is larger."""
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest).half().float()
