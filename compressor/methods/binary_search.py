"""Partial binarization under the Hessian: which weights are salient, which signs the others have, and all their values.

`search_` takes turns (see `binary_fit`); `settle_` makes of the result what can be stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

SHRINK = 0.5
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


def search_(
    chunks: Sequence[Rows], A: Tensor, *, count: int | None, bits: int, rounds: int, block: int, by_input: bool = False
) -> None:
    """Improve ``chunks``, all rows of a matrix some at a time, by ``rounds`` rounds under ``A`` (n, n).

    A round refits values, means and scales, and then moves every weight to its best sign or, with a ``count``, across
    the border of what is salient. That border is one price for the whole matrix: what the last of ``count`` salient
    weights gains. Exactly ``count`` are salient after each round.

    Args:
        count: salient weights of the matrix; None leaves them as they are.
        bits: of a salient weight.
        block: inputs whose moves are passed on to the others together.
        by_input: whether grids are those of inputs.
    """
    for _ in range(rounds):
        for rows in chunks:
            refit_(rows, A, CG_STEPS)
        if count is None:
            for rows in chunks:
                descend_(rows, A, gradient(rows, A), block=block)
        else:
            _renew_mask_(chunks, A, count, bits, block)
    for rows in chunks:
        refit_(rows, A, CG_STEPS)


def _renew_mask_(chunks: Sequence[Rows], A: Tensor, count: int, bits: int, block: int) -> None:
    grids = [None if bits >= FINE else row_grids(rows, A, bits) for rows in chunks]
    pull = [gradient(rows, A) for rows in chunks]
    prices = [price(rows, A, g, grid).flatten() for rows, g, grid in zip(chunks, pull, grids, strict=True)]
    above = kth_largest(torch.cat(prices), count)
    del prices
    for rows, g, grid in zip(chunks, pull, grids, strict=True):
        snap: Snap | None = None if grid is None else SalientGrids(grid, by_input=False).snap
        descend_(rows, A, g, above=above, snap=snap, block=block)
    _recount_(chunks, A, pull, count)


def kth_largest(x: Tensor, k: int) -> float:
    """Return the ``k``-th largest of ``x`` (N,), infinity for 0."""
    return float(x.kthvalue(len(x) - k + 1).values) if k else math.inf


def _recount_(chunks: Sequence[Rows], A: Tensor, pull: Sequence[Tensor], count: int) -> None:
    """Make exactly ``count`` weights salient: those too many of least price become signs, or the reverse."""
    salient = torch.cat([rows.salient for rows in chunks], dim=1)
    surplus = int(torch.count_nonzero(salient)) - count
    if surplus == 0:
        return
    prices = torch.cat([price(rows, A, g) for rows, g in zip(chunks, pull, strict=True)], dim=1)
    prices = prices.masked_fill_(salient, math.inf) if surplus < 0 else prices.masked_fill_(~salient, -math.inf)
    kept = keep_exactly(prices, prices, prices.numel() - count, None)
    for rows, chosen in zip(chunks, torch.split(kept, [rows.target.shape[1] for rows in chunks], dim=1), strict=True):
        nearest = rows.value >= spread(rows.mean, rows.group, len(rows.value))
        rows.plus = torch.where(rows.salient & ~chosen, nearest, rows.plus)
        rows.salient = chosen.contiguous()
        rows.assemble_()


def settle_(
    chunks: Sequence[Rows], A: Tensor | None, *, bits: int, block: int, by_input: bool = False
) -> list[SalientGrids]:
    """Shrink rows that could not be fitted well, round everything to what can be stored, and descend once more.

    Args:
        A: (n, n), or None where there is no data: then rows are not shrunk, and nothing moves after rounding.

    Returns:
        For each chunk the grids on which its salient weights now stand; those of inputs are the same for all.
    """
    if A is not None:
        for rows in chunks:
            _shrink_(rows, A)
    if by_input:
        common = _input_grids(chunks, bits)
        grids = [SalientGrids(common, by_input=True)] * len(chunks)
    else:
        grids = [SalientGrids(row_grids(rows, A, bits), by_input=False) for rows in chunks]
    for rows, grid in zip(chunks, grids, strict=True):
        rows.mean, rows.scale = half(rows.mean), half(rows.scale)
        rows.value = torch.where(rows.salient, grid.offsets(rows.value) * grid.step(), rows.value)
        rows.assemble_()
        if A is not None:
            g = gradient(rows, A)
            for _ in range(POLISH):
                descend_(rows, A, g, snap=grid.snap, block=block)
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


def _input_grids(chunks: Sequence[Rows], bits: int) -> IntGrid:
    """Return the grid (n,) of each input that is best for its values, where whole inputs are salient."""
    kept = torch.cat([rows.value.masked_fill(~rows.salient, 0) for rows in chunks], dim=1).T
    return best_grids(kept, candidate_grids(kept, bits, asymmetric=False, clip=True), 1)[0]


def half(x: Tensor) -> Tensor:
    """Return ``x`` rounded to numbers of fp16, the largest of them where it is larger."""
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest).half().float()
