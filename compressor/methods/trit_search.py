"""Trit planes of one group under a quadratic loss (x - q) S (x - q)^T: successive rounding, refitted scales, descent.

Weights stand in columns: X (c, M) holds c inputs of M rows, scales are (K, M). ``frozen`` (c, M) bool marks weights
that must be zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.methods.cholesky import NotPositiveDefiniteError, triangular_inverse_, upper_inverse_factor
from compressor.methods.sweep import PANEL, sweep
from compressor.methods.threads import matmul, submul_
from compressor.methods.trit_fit import many_starts, row_loss
from compressor.methods.trit_levels import Levels, best_scales

FINALISTS = 512
"""Inputs of a group times ends of the starts that are searched under S: four for 128 inputs, one from 512 on."""

PASSES = 4
CHUNK = 1 << 16


@dataclass(frozen=True)
class GroupFit:
    """``scale`` (K, M) fp32 in the stored form, and the ``value`` (c, M) of every weight."""

    scale: Tensor
    value: Tensor


def search_group(X: Tensor, upper: Tensor, planes: int, frozen: Tensor | None = None) -> GroupFit:
    """Find scales and trits of little loss (x - q) S (x - q)^T where S = (U^T U)^-1.

    From every start: successive rounding of the inputs (the column sweep, which is Babai's nearest plane), the scales
    refitted to the trits, one round of descent, the scales refitted again; and once more. The best end of each row.

    Args:
        X: (c, M) fp32.
        upper: U (c, c), upper triangular.
    """
    order, S, U = _hardest_first(upper)
    weights = U.diagonal().reciprocal().square()[:, None]
    weights /= weights.mean()
    finalists = max(1, FINALISTS // len(X))
    X = X[order]
    still = None if frozen is None else frozen[order]
    columns = max(1, CHUNK // len(X))
    fits = []
    for a in range(0, X.shape[1], columns):
        part = slice(a, a + columns)
        frozen_part = None if still is None else still[:, part]
        fits.append(_search(X[:, part], S, U, weights, planes, finalists, frozen_part))
    value = torch.empty_like(X)
    value[order] = torch.cat([fit.value for fit in fits], dim=1)
    return GroupFit(torch.cat([fit.scale for fit in fits], dim=1), value)


def _hardest_first(upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (order, S, U) of the inputs reordered: those first whose error the others could make up for the least.

    These are the smallest on the diagonal of S^-1; ties by position. The given order where S has no factor in fp32.
    """
    V = triangular_inverse_(upper.T.clone())  # (U^-1)^T
    S = matmul(V.T, V)
    order = upper.square().sum(0).argsort(stable=True)
    try:
        return order, S[order][:, order], upper_inverse_factor(S[order][:, order])
    except NotPositiveDefiniteError:
        return torch.arange(len(S), device=S.device), S, upper


def _search(
    X: Tensor, S: Tensor, U: Tensor, weights: Tensor, planes: int, finalists: int, frozen: Tensor | None
) -> GroupFit:
    M = X.shape[1]
    scale = many_starts(X, weights, planes, finalists)
    count = scale.shape[1]
    scale = scale.reshape(planes, -1)
    many = X.repeat(1, count)
    still = None if frozen is None else frozen.repeat(1, count)
    pull = matmul(S, many)
    best = GroupFit(scale, torch.zeros_like(many))
    least = torch.full_like(many[0], torch.inf)
    for _ in range(PASSES):
        levels = Levels.of(scale)
        index = _rounded(many, U, levels, still)
        levels, index = refitted(levels, index, S, pull)
        gradient = matmul(S, many - levels.value.gather(0, index))
        index = descend_(gradient, levels.value.gather(0, index), S, levels, still)
        levels, index = refitted(levels, index, S, pull)
        scale, value = levels.scale, levels.value.gather(0, index)
        loss = row_loss(many - value, S)
        better = loss < least
        least = torch.where(better, loss, least)
        best = GroupFit(torch.where(better, scale, best.scale), torch.where(better, value, best.value))
    chosen = least.view(count, M).argmin(0)

    def pick(kept: Tensor) -> Tensor:
        return kept.view(-1, count, M).gather(1, chosen.expand(len(kept), 1, M))[:, 0]

    return GroupFit(pick(best.scale), pick(best.value))


def _rounded(X: Tensor, U: Tensor, levels: Levels, frozen: Tensor | None) -> Tensor:
    """Return the indices (c, M) of the levels that the column sweep rounds ``X`` (c, M) to."""
    index = torch.empty(X.shape, dtype=torch.int64, device=X.device)
    zero = len(levels.value) // 2

    def snap(j: int, x: Tensor) -> Tensor:
        chosen = levels.nearest(x)
        if frozen is not None:
            chosen.masked_fill_(frozen[j], zero)
        index[j] = chosen
        return levels.value.gather(0, chosen[None])[0]

    sweep(X.T, U, snap=snap)
    return index


def refitted(levels: Levels, index: Tensor, S: Tensor, pull: Tensor) -> tuple[Levels, Tensor]:
    """Return the levels of the best scales for the trits of ``index`` (c, M), and the trits' indices there.

    ``pull`` (c, M) is S X for the target X.
    """
    levels, moved = levels.moved(best_scales(levels.planes(index), S, pull))
    return levels, moved.gather(0, index)


def descend_(gradient: Tensor, value: Tensor, S: Tensor, levels: Levels, frozen: Tensor | None = None) -> Tensor:
    """Move every weight in turn to the level of least loss, all others fixed, and return the indices (c, M).

    Args:
        gradient: S (X - Q), (c, M); kept up to date, in place.
        value: Q (c, M), on the levels; overwritten.
    """
    index = torch.empty(value.shape, dtype=torch.int64, device=value.device)
    zero = len(levels.value) // 2
    reciprocal = S.diagonal().reciprocal()
    for p in range(0, len(value), PANEL):
        q = min(p + PANEL, len(value))
        before = value[p:q].clone()
        for j in range(p, q):
            chosen = levels.nearest(torch.addcmul(value[j], gradient[j], reciprocal[j]))
            if frozen is not None:
                chosen.masked_fill_(frozen[j], zero)
            index[j] = chosen
            settled = levels.value.gather(0, chosen[None])[0]
            gradient[p:q].addcmul_(S[p:q, j, None], (settled - value[j])[None], value=-1)
            value[j] = settled
        step = value[p:q] - before
        submul_(gradient[:p], S[:p, p:q], step)
        submul_(gradient[q:], S[q:, p:q], step)
    return index
