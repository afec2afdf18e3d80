"""GPTQ (Frantar et al., arXiv 2210.17323): rounding column by column, with feedback to the columns that follow.

What differs from the publication, each for the better by measurement (docs/benchmarks.md):

- Groups stay contiguous under the order of activation: groups go by their largest second moment, inputs within a group
  by their own. The stored matrix is in its own order.
- A group's grid is chosen when the sweep gets there, from its updated weights: of the grids with the least rounding
  error, the one under which the sweep over the group itself loses least. Scales may be negative (`int_grid`).
- Afterwards codes and scales are refined together (`code_descent`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.formats.group_int import GroupInt
from compressor.methods import round_nearest
from compressor.methods.code_descent import descend
from compressor.methods.int_grid import IntGrid, best_grids, candidate_grids
from compressor.methods.quantize_settings import GptqSettings
from compressor.methods.result import Quantized
from compressor.methods.round_nearest import foresee, grid_notes
from compressor.methods.statistics import InputStatistics
from compressor.methods.sweep import settle_, sweep
from compressor.methods.threads import matmul

__all__ = ["TRIALS", "drift_target", "foresee", "settling_order", "solve"]

TRIALS = 8
"""Grids of a group under which the sweep over it is tried."""


def solve(
    weight: Tensor,
    stats: InputStatistics | None,
    settings: GptqSettings,
    frozen: Tensor | None = None,
    drift: Tensor | None = None,
) -> Quantized:
    """Quantize ``weight`` (m, n) fp32 such that its outputs change little; without ``stats`` round to nearest.

    Args:
        frozen: (m, n) bool, stays zero, and the other weights make up for what the feedback would have put there.
        drift: (n, n) fp32, sum over tokens of (x_dense - x) x^T, where x is the input now, as in ``stats``, and x_dense
            what it was before anything was compressed: then the outputs aimed at are those of x_dense. By default
            the share ``settings.drift`` of what ``stats`` tells.

    Raises:
        FactorizationError: the Hessian cannot be factorized.
    """
    if stats is None:
        return round_nearest.solve(weight, None, settings, frozen)
    n = weight.shape[1]
    width = settings.width(n)
    diagonal = stats.hessian.diagonal()
    order = settling_order(diagonal if settings.act_order else torch.zeros_like(diagonal), width)
    factor = stats.factor(settings.damp, order)
    if drift is None and settings.drift and stats.drift is not None:
        drift = settings.drift * stats.drift
    target = weight if drift is None else drift_target(weight, drift, factor.upper, order)
    codes, scale, zero = _sweep_groups(target[:, order], factor.upper, width, settings, _ordered(frozen, order))
    back, groups = torch.argsort(order), torch.argsort(order[::width])
    code = GroupInt(codes[:, back], scale[:, groups], None if zero is None else zero[:, groups], settings.bits)
    if settings.refine:
        code = descend(target, code, stats.hessian, stats.shift(settings.damp), settings.refine, frozen)
    notes = grid_notes(weight, settings)
    return Quantized(code, (*notes, f"the Hessian needed: {', '.join(factor.rungs)}") if factor.rungs else notes)


def settling_order(diagonal: Tensor, width: int) -> Tensor:
    """Return the inputs (n,) int64 in the order in which the sweep settles them; groups of ``width`` stay together.

    Groups by their largest entry of ``diagonal`` (n,), inputs within a group by their own, both from the largest down;
    ties keep their order.
    """
    by_group = diagonal.view(-1, width)
    inside = by_group.argsort(dim=1, descending=True, stable=True)
    outside = by_group.amax(1).argsort(dim=0, descending=True, stable=True)
    starts = torch.arange(0, len(diagonal), width, device=diagonal.device)
    return (inside + starts[:, None])[outside].reshape(-1)


def drift_target(weight: Tensor, drift: Tensor, upper: Tensor, order: Tensor) -> Tensor:
    """Return W + W D A^-1 (m, n): the weights whose outputs on the inputs now are nearest to W's on the dense inputs.

    A is the damped Hessian of the inputs in ``order``, of which ``upper`` is the factor U with A^-1 = U^T U. (The
    aim of GPTAQ, Li et al., arXiv 2504.02692, here solved for before the sweep and not column by column within it.)
    """
    shift = matmul(matmul(matmul(weight, drift)[:, order], upper.T), upper)
    return weight + shift[:, torch.argsort(order)]


def _sweep_groups(
    W: Tensor, upper: Tensor, width: int, settings: GptqSettings, frozen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes (m, n) int8, scales (m, G) and zero points (m, G) int8 or None of ``W`` (m, n)."""
    m, n = W.shape
    scale = torch.empty(n // width, m, device=W.device)
    zero = torch.zeros_like(scale)
    kept = None if frozen is None else ~frozen.T
    importance = upper.diagonal().square().reciprocal()
    grid: IntGrid

    def decide(start: int, columns: Tensor) -> Tensor | None:
        nonlocal grid
        part = slice(start, start + width)
        keep = None if kept is None else kept[part]
        grid = _choose(columns, upper[part, part], importance[part], settings, keep)
        scale[start // width] = grid.scale
        if grid.zero is not None:
            zero[start // width] = grid.zero
        return keep

    swept = sweep(W, upper, decide=decide, span=width, snap=lambda j, w: grid.snap(w), block=settings.block)
    codes = (swept.weight.view(m, -1, width) / scale.T[:, :, None]).round_().add_(zero.T[:, :, None])
    zeros = zero.T.to(torch.int8).contiguous() if settings.asymmetric else None
    return codes.view(m, n).to(torch.int8), scale.T.contiguous(), zeros


def _choose(columns: Tensor, upper: Tensor, importance: Tensor, settings: GptqSettings, keep: Tensor | None) -> IntGrid:
    """Return the grid (m,) under which the sweep over ``columns`` (w, m) alone loses least, of those that fit best."""
    X = columns if keep is None else columns * keep
    candidates = candidate_grids(X, settings.bits, asymmetric=settings.asymmetric, clip=settings.clip)
    grids = best_grids(X, candidates, TRIALS, importance)
    trials, m = grids.scale.shape
    if trials == 1:
        return grids[0]
    each = grids.flat()  # as if there were a row for each trial
    _, losses = settle_(
        columns.repeat(1, trials),
        upper,
        decide=None if keep is None else lambda start, c: keep[start : start + len(c)].repeat(1, trials),
        snap=lambda j, w: each.snap(w),
        block=settings.block,
    )
    return grids.gather(losses.view(trials, m).argmin(0)[None])[0]


def _ordered(frozen: Tensor | None, order: Tensor) -> Tensor | None:
    return None if frozen is None else frozen[:, order]
