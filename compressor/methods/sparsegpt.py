"""SparseGPT (Frantar and Alistarh, "Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774).

As published, but for the selection: exactly k weights of a tile go, where the published threshold takes one too many.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressor.methods import masks
from compressor.methods.magnitude import target, without_data
from compressor.methods.refit import refit_if_asked
from compressor.methods.result import Pruned, RowGrid
from compressor.methods.settings import SparseGPTSettings
from compressor.methods.statistics import InputStatistics
from compressor.methods.sweep import Decide, Snap, Swept, sweep


def solve(
    weight: Tensor,
    stats: InputStatistics | None,
    settings: SparseGPTSettings,
    sparsity: float | None,
    frozen: Tensor | None = None,
) -> Pruned:
    """Prune ``weight`` (m, n) fp32 in one sweep, and quantize it in the same sweep where ``settings.bits`` says so.

    The mask of a tile (m, block) is chosen from its updated weights by w^2 / U_jj^2 (eq. 3), the smallest go; ties by
    |w|, then column, then row. N:M masks are chosen where a group starts. Weights of dead inputs become zero. Without
    ``stats``, magnitude.

    Raises:
        FactorizationError: the Hessian cannot be factorized.
        UserError: the pattern does not divide n.
    """
    if stats is None:
        pruned = without_data(weight, settings, sparsity, frozen, "sparsegpt")
        return pruned if settings.bits is None else _round(pruned, weight, settings.bits)
    m, n = weight.shape
    factor = stats.factor(settings.damp)
    U = factor.upper
    W = weight.masked_fill(factor.dead, 0)
    if frozen is not None:
        W = W.masked_fill(frozen, 0)
    if settings.group is not None:
        masks.check_divides(n, *settings.group)
        decide, span = _by_group(U, *settings.group, frozen), settings.group[1]
    else:
        span = min(settings.block, n)
        decide = _by_tile(U, m, masks.count(target(sparsity, settings), m * n), span, frozen)
    notes = _notes(factor.rungs)
    if settings.bits is None:
        swept = sweep(W, U, decide=decide, span=span, block=settings.block)
        pruned = Pruned(swept.weight, _filled_up(swept, settings, frozen), notes=notes)
        return refit_if_asked(pruned, weight, stats, settings, frozen)
    scale, zero = row_grid(weight, settings.bits)
    swept = sweep(W, U, decide=decide, span=span, block=settings.block, snap=_snap(scale, zero, settings.bits))
    return _coded(Pruned(swept.weight, _filled_up(swept, settings, frozen), notes=notes), scale, zero, settings.bits)


def _filled_up(swept: Swept, settings: SparseGPTSettings, frozen: Tensor | None) -> Tensor:
    """The mask of a sweep, with N of every M kept also where frozen positions left fewer: these are kept zeros."""
    if settings.group is None or frozen is None:
        return swept.mask
    return masks.keep_pattern(swept.mask.float(), swept.weight, *settings.group)


def _by_tile(U: Tensor, m: int, pruned: int, span: int, frozen: Tensor | None) -> Decide:
    """Choose within tiles of ``span`` columns; earlier pruned weights count, the rest is shared out by free weights."""
    n = U.shape[0]
    sizes = [m * min(span, n - a) for a in range(0, n, span)]
    if frozen is not None:
        per_column = frozen.sum(0).tolist()
        sizes = [size - sum(per_column[i * span : (i + 1) * span]) for i, size in enumerate(sizes)]
        pruned = max(0, pruned - sum(per_column))
    counts = masks.tile_counts(pruned, sizes)
    reciprocal = U.diagonal().reciprocal().unsqueeze(1)

    def decide(start: int, W: Tensor) -> Tensor:
        score = (W * reciprocal[start : start + len(W)]).square_()
        still = None if frozen is None else frozen[:, start : start + len(W)].T
        if still is not None:
            score.masked_fill_(still, math.inf)
        drop = masks.smallest(score.view(1, -1), W.abs().view(1, -1), counts[start // span]).view_as(W)
        return ~drop if still is None else ~(drop | still)

    return decide


def _by_group(U: Tensor, kept: int, group: int, frozen: Tensor | None) -> Decide:
    reciprocal = U.diagonal().reciprocal()

    def decide(start: int, W: Tensor) -> Tensor:
        columns = W.T.contiguous()
        score = (columns * reciprocal[start : start + group]).square_()
        still = None if frozen is None else frozen[:, start : start + group]
        keep = masks.keep_pattern(score, columns, kept, group, still)
        return (keep if still is None else keep & ~still).T

    return decide


def row_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the asymmetric min-max grid of every row: scale (m,) fp32 of fp16 values, zero (m,) fp32 of integers."""
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    flat = low == high
    low, high = low.masked_fill(flat, -1), high.masked_fill(flat, 1)
    tiny, huge = 2.0**-24, torch.finfo(torch.float16).max
    scale = ((high - low) / (2**bits - 1)).clamp(tiny, huge).half().float()
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def _snap(scale: Tensor, zero: Tensor, bits: int) -> Snap:
    top = 2**bits - 1
    return lambda j, w: ((w / scale).round_().add_(zero).clamp_(0, top)).sub_(zero).mul_(scale)


def _coded(pruned: Pruned, scale: Tensor, zero: Tensor, bits: int) -> Pruned:
    """Add the codes of weights that stand on the grid."""
    codes = (pruned.weight / scale[:, None]).round_().add_(zero[:, None]).to(torch.uint8)
    return Pruned(pruned.weight, pruned.mask, RowGrid(codes, scale, zero.to(torch.uint8), bits), pruned.notes)


def _round(pruned: Pruned, weight: Tensor, bits: int) -> Pruned:
    scale, zero = row_grid(weight, bits)
    rounded = _snap(scale[:, None], zero[:, None], bits)(0, pruned.weight).masked_fill(~pruned.mask, 0)
    return _coded(Pruned(rounded, pruned.mask, notes=pruned.notes), scale, zero, bits)


def _notes(rungs: tuple[str, ...]) -> tuple[str, ...]:
    return (f"the Hessian needed: {', '.join(rungs)}",) if rungs else ()
