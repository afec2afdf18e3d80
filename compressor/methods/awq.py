"""AWQ (Lin et al., arXiv 2306.00978): inputs that matter are scaled up before rounding, and down where they are made.

With scales s > 0 the codes are those of W diag(s), and the input comes as x / s: whoever calls `find_scales` divides
what makes the input. What differs from the publication:

- The loss of a choice of s is exactly tr((W - Q) H (W - Q)^T) with the Hessian H of the input: no forward passes.
- The grid of a group is that of least error of the group's outputs, H again, rather than one of a few clippings; and
  then once more given the errors of the row's other groups. A row that would lose more so than with the grids of plain
  rounding takes those.
- Scales only serve where the matrices together lose less with them, fitted as they will be stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.formats.group_int import GroupInt
from compressor.methods import round_nearest
from compressor.methods.int_grid import IntGrid, candidate_grids
from compressor.methods.quadratic import row_losses
from compressor.methods.quantize_settings import AwqSettings, GroupIntSettings
from compressor.methods.result import Quantized
from compressor.methods.round_nearest import foresee, grid_notes
from compressor.methods.statistics import InputStatistics, check_finite
from compressor.methods.threads import matmul

__all__ = ["Reader", "exponents_of", "find_scales", "foresee", "loss_under", "solve"]

REACH = 8
"""Scales lie between 2^-8 and 2^8."""

SAMPLE = 128
"""Rows of each matrix that the search looks at; what it finds is judged on all of them."""

TRIED = (1.0, 0.85, 0.7)
"""Multiples of the largest weight's scale that are tried within the coarse search."""

SHORTLIST = 2
"""Candidates of the coarse search that are judged on all rows, with the whole search for grids."""

KEPT = 8
"""Grids of a group that are judged by the loss of its outputs."""

ROUNDS = 1
"""How often the grids are chosen again, given the errors of the other groups."""


@dataclass(frozen=True)
class Reader:
    """A matrix that reads the input: ``weight`` (m, n) fp32, zero where pruned, and how it will be quantized."""

    weight: Tensor
    settings: GroupIntSettings


def solve(
    weight: Tensor, stats: InputStatistics | None, settings: AwqSettings, frozen: Tensor | None = None
) -> Quantized:
    """Round ``weight`` (m, n) fp32 on the grids that suit its input; without ``stats`` round to nearest.

    ``frozen`` (m, n) bool: stays zero where the grid has a zero.

    Raises:
        NonFiniteHessianError: NaN or infinity in the Hessian.
    """
    if stats is None:
        return round_nearest.solve(weight, None, settings, frozen)
    check_finite(stats.hessian)
    W = weight if frozen is None else weight.masked_fill(frozen, 0)
    return Quantized(fit(W, stats.hessian, settings), grid_notes(weight, settings))


def fit(
    weight: Tensor, hessian: Tensor, settings: GroupIntSettings, keep: int = KEPT, rounds: int = ROUNDS
) -> GroupInt:
    """Round ``weight`` (m, n) fp32 to nearest, on grids under which the outputs change little.

    A group's grid is that of least d H_gg d^T, d being the group's error, among the ``keep`` grids of least error
    weighted by the diagonal; then, ``rounds`` times, that of least loss given the errors of the row's other groups.
    Rows that lose more under ``hessian`` (n, n) than with the grids of plain rounding get those.
    """
    m, n = weight.shape
    width = settings.width(n)
    kept: list[IntGrid] = []
    plain: list[IntGrid] = []
    for start in range(0, n, width):
        part = slice(start, start + width)
        X = weight[:, part].T.contiguous()
        candidates = candidate_grids(X, settings.bits, asymmetric=settings.asymmetric, clip=settings.clip)
        weighted, even = _both_errors(X, candidates, hessian[part, part].diagonal().clamp(min=0)[:, None])
        kept.append(candidates.gather(weighted.sort(dim=0, stable=True).indices[:keep]))
        plain.append(candidates.gather(even.argmin(0)[None])[0])
    errors = torch.zeros_like(weight)
    fitted = [grids[0] for grids in kept]
    for turn in range(1 + rounds if keep > 1 and len(kept[0].scale) > 1 else 0):
        if turn and n == width:
            break
        for g, start in enumerate(range(0, n, width)):
            part = slice(start, start + width)
            X, own = weight[:, part].T.contiguous(), hessian[part, part]
            cross = None
            if turn:
                cross = matmul(hessian[part], errors.T) - matmul(own, errors[:, part].T)
            losses = []
            for c in range(len(kept[g].scale)):
                D = X - kept[g][c].snap(X)
                inner = matmul(own, D)
                losses.append((D * (inner if cross is None else inner + 2 * cross)).sum(0))
            fitted[g] = kept[g].gather(torch.stack(losses).argmin(0)[None])[0]
            errors[:, part] = (X - fitted[g].snap(X)).T
    ours, theirs = _stack(fitted), _stack(plain)
    better = (_losses(weight, ours, hessian) < _losses(weight, theirs, hessian)).repeat_interleave(n // width)
    grid = _take(theirs, ours, better)
    X = _by_group(weight, width)
    offsets = grid.offsets(X)
    codes = (offsets if grid.zero is None else offsets + grid.zero).T.reshape(m, n).to(torch.int8)
    zero = None if grid.zero is None else grid.zero.view(m, -1).to(torch.int8)
    return GroupInt(codes, grid.scale.view(m, -1), zero, settings.bits)


def _stack(grids: Sequence[IntGrid]) -> IntGrid:
    """Return the grids of all groups, row by row, of those of all rows, group by group."""
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    scale = torch.stack([grid.scale for grid in grids], 1).reshape(-1)
    return IntGrid(scale, torch.stack(zeros, 1).reshape(-1) if zeros else None, grids[0].bits)


def find_scales(readers: Sequence[Reader], hessian: Tensor, source: Tensor, steps: int) -> Tensor:
    """Return log2 of the scales, (p,) fp32, under which the matrices together lose least.

    Args:
        hessian: (n, n) fp32, of the input that all readers share.
        source: (n,) int64, below p: input j has the scale number source[j] (several inputs may share one).
        steps: candidates of `exponents_of` that are tried besides no scales (the publication: 20).

    A coarse search on some rows leaves a few candidates; these are judged by what is really lost with them, and by what
    is lost without scales: all are 0 where that is less.
    """
    none = torch.zeros(int(source.max()) + 1, device=hessian.device)
    sample = [Reader(r.weight[:: max(1, len(r.weight) // SAMPLE)], r.settings) for r in readers]
    candidates = list(exponents_of(readers, hessian, source, steps))
    coarse = [_coarse_loss(sample, hessian, candidate[source]) for candidate in candidates]
    shortlist = sorted(range(len(candidates)), key=coarse.__getitem__)[:SHORTLIST]
    finalists = [none, *(candidates[number] for number in shortlist)]
    losses = [loss_under(readers, hessian, exponents[source]) for exponents in finalists]
    return finalists[losses.index(min(losses))]


def exponents_of(readers: Sequence[Reader], hessian: Tensor, source: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield log2 of the scales of the published family, (p,) each: |x|^a / max|w|^(1-a) and |x|^a in turn, 0 < a <= 1.

    |x| is the root mean square of an input. Inputs that are never there, or that nothing reads, have the scale 1.
    """
    channels = int(source.max()) + 1
    power, largest = torch.zeros(2, channels, device=hessian.device)
    power.scatter_reduce_(0, source, hessian.diagonal().clamp(min=0), "amax")
    for reader in readers:
        largest.scatter_reduce_(0, source, reader.weight.abs().amax(0), "amax")
    live = (power > 0) & (largest > 0)
    x, w = (torch.where(live, value, 1).log2() for value in (power.sqrt(), largest))
    for number in range(1, steps + 1):
        a = number / steps
        sizes = a * x if number % 2 == 0 else a * x - (1 - a) * w
        middle = (sizes[live].amax() + sizes[live].amin()) / 2 if bool(live.any()) else 0.0
        yield torch.where(live, (sizes - middle).clamp_(-REACH, REACH), 0)


def loss_under(readers: Sequence[Reader], hessian: Tensor, exponents: Tensor) -> float:
    """Return the sum of tr((W - Q) H (W - Q)^T) over the readers, fitted with scales 2^``exponents`` (n,)."""
    s = torch.exp2(exponents)
    scaled = hessian / s / s[:, None]
    losses = []
    for reader in readers:
        W = reader.weight * s
        losses += row_losses(W - fit(W, scaled, reader.settings).dense(), scaled).double().clamp(min=0).tolist()
    return math.fsum(losses)


def _by_group(weight: Tensor, width: int) -> Tensor:
    """Return (width, groups): one group of a row in each column."""
    return weight.reshape(-1, width).T.contiguous()


def _both_errors(X: Tensor, grids: IntGrid, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared errors (c, m) of groups ``X`` (w, m), weighted by ``importance`` and not."""
    weighted, even = torch.empty(2, len(grids.scale), X.shape[1], device=X.device)
    for c in range(len(grids.scale)):
        squares = (X - grids[c].snap(X)).square_()
        even[c] = squares.sum(0)
        weighted[c] = squares.mul_(importance).sum(0)
    return weighted, even


def _take(kept: IntGrid, other: IntGrid, where: Tensor) -> IntGrid:
    zero = None if kept.zero is None or other.zero is None else torch.where(where, other.zero, kept.zero)
    return IntGrid(torch.where(where, other.scale, kept.scale), zero, kept.bits)


def _losses(weight: Tensor, grid: IntGrid, hessian: Tensor) -> Tensor:
    """Return the loss (m,) of every row of ``weight`` (m, n) rounded on ``grid`` (groups of all rows)."""
    m, n = weight.shape
    width = m * n // len(grid.scale)
    rounded = grid.snap(_by_group(weight, width)).T.reshape(m, n)
    return row_losses(weight - rounded, hessian)


def _coarse_loss(readers: Sequence[Reader], hessian: Tensor, exponents: Tensor) -> float:
    """Like `loss_under`, with a coarser search for the grids."""
    s = torch.exp2(exponents)
    scaled = hessian / s / s[:, None]
    losses = []
    for reader in readers:
        W = reader.weight * s
        losses += row_losses(W - _coarse(W, scaled, reader.settings), scaled).double().clamp(min=0).tolist()
    return math.fsum(losses)


def _coarse(weight: Tensor, hessian: Tensor, settings: GroupIntSettings) -> Tensor:
    """Return ``weight`` (m, n) rounded, its grids taken from a few."""
    m, n = weight.shape
    width = settings.width(n)
    X = _by_group(weight, width)
    grids = candidate_grids(
        X, settings.bits, asymmetric=settings.asymmetric, clip=settings.clip, factors=TRIED, signs=False
    )
    importance = hessian.diagonal().clamp(min=0).view(-1, width).T.repeat(1, m)  # of each group of each row
    best = torch.full_like(X[0], math.inf)
    chosen = grids[0]
    for c in range(len(grids.scale)):
        error = (X - grids[c].snap(X)).square_().mul_(importance).sum(0)
        chosen = _take(chosen, grids[c], error < best)
        best = torch.minimum(error, best)
    return chosen.snap(X).T.reshape(m, n)
