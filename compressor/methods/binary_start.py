"""Where partial binarization starts: masks, signs and scales from one column sweep, or from the weights alone."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.methods.binary_fit import Rows, on_weights, price_alone, spread
from compressor.methods.cholesky import upper_inverse_factor
from compressor.methods.int_grid import candidate_grids
from compressor.methods.masks import count, keep_exactly, tile_counts
from compressor.methods.sweep import sweep
from compressor.methods.threads import matmul

LOOKS = 2
"""How often the mask of a group is chosen again, by what a sign would cost with the means and scales so far."""


def swept(
    W: Tensor, upper: Tensor, *, salient: float, group: int, hessian: bool, block: int, means: bool = True
) -> Rows:
    """Binarize ``W`` (m, n) fp32 column by column with feedback; a group's mask, means and scales when it is reached.

    They are made from the updated weights, and means and scales from those alone that are binarized. What is salient is
    the share ``salient`` of each group: the weights of largest magnitude, or with ``hessian`` those for which a sign
    would cost most, error over U_jj squared.

    Args:
        upper: U (n, n).
    """
    m, n = W.shape
    widths = [min(group, n - start) for start in range(0, n, group)]
    counts = tile_counts(count(salient, m * n), [m * width for width in widths])
    grid = candidate_grids(W.T, 8, asymmetric=True, clip=False)[0]
    importance = upper.diagonal().reciprocal()[:, None]
    fits: list[Rows] = []

    def decide(start: int, columns: Tensor) -> None:
        drop = columns.numel() - counts[start // group]
        if hessian:
            chosen = _by_cost(columns, importance[start : start + len(columns)], drop, means)
        else:
            chosen = keep_exactly(columns.abs(), columns, drop, None)
        fits.append(on_weights(columns, chosen, len(columns), means=means))

    def snap(j: int, w: Tensor) -> Tensor:
        fit = fits[-1]
        mean, scale = fit.mean[0], fit.scale[0]
        near = torch.where(w >= mean, mean + scale, mean - scale)
        return torch.where(fit.salient[j % group], grid.snap(w), near)

    value = sweep(W, upper, decide=decide, span=group, snap=snap, block=block).weight.T.contiguous()
    mean, scale, chosen = (torch.cat([getattr(fit, name) for fit in fits]) for name in ("mean", "scale", "salient"))
    return Rows(W.T.contiguous(), value, chosen, value >= spread(mean, group, n), mean, scale, group, means)


def _by_cost(columns: Tensor, importance: Tensor, drop: int, means: bool) -> Tensor:
    """The mask (c, m) of one group that drops the ``drop`` weights for which a sign costs least."""
    chosen = keep_exactly((columns * importance).abs(), columns, drop, None)
    for _ in range(LOOKS):
        cost = price_alone(on_weights(columns, chosen, len(columns), means=means))
        chosen = keep_exactly(cost * importance.square(), columns, drop, None)
    return chosen


def by_inputs(
    W: Tensor, A: Tensor, *, salient: float, group: int, hessian: bool, block: int, means: bool = True
) -> Rows:
    """Binarize ``W`` (m, n) fp32 but for whole inputs, the share ``salient`` of them, under ``A`` (n, n).

    The sweep settles the salient inputs last, so that they make up for all the others.
    """
    n = W.shape[1]
    target = W.T.contiguous()
    chosen = torch.zeros(n, dtype=torch.bool, device=W.device)
    number = count(salient, n)
    if hessian:
        alone = on_weights(target, torch.zeros_like(target, dtype=torch.bool), group, means=means)
        chosen[most_helpful(price_alone(alone).mean(1), A, number)] = True
    else:
        chosen[target.square().sum(1).argsort(descending=True, stable=True)[:number]] = True
    rows = on_weights(target, chosen[:, None].repeat(1, len(W)), group, means=means)
    order = torch.cat([(~chosen).nonzero().flatten(), chosen.nonzero().flatten()])
    places = order.tolist()

    def snap(j: int, w: Tensor) -> Tensor:
        if j >= n - number:
            return w
        mean, scale = (x[places[j] // group] for x in (rows.mean, rows.scale))
        return torch.where(w >= mean, mean + scale, mean - scale)

    settled = sweep(W[:, order], upper_inverse_factor(A[order][:, order]), snap=snap, block=block).weight
    rows.value[order] = settled.T
    rows.plus = rows.value >= spread(rows.mean, group, n)
    return rows


def most_helpful(errors: Tensor, A: Tensor, number: int) -> Tensor:
    """Return the ``number`` inputs (int64) that, left free, make up best for the errors of all inputs, and their own.

    Errors are taken as independent, with variances ``errors`` (n,). With the inputs S free, the loss of errors d is
    d (A - A_S A_SS^-1 A_S^T) d. One input after the other is added, each the one by which the mean of this falls most:
    sum_i errors_i A_ij^2 / A_jj under the A that is left. As in a Cholesky factorization with pivots, that A is never
    written down, but A - V V^T.
    """
    V = A.new_zeros(len(A), number)
    gain = (A.square() * errors[:, None]).sum(0, dtype=torch.float64)
    diagonal = A.diagonal().double()
    tiny = 1e-9 * diagonal.clamp(min=0)
    chosen: list[int] = []
    for k in range(number):
        score = torch.where(diagonal > tiny, gain / diagonal, 0)
        score[chosen] = -1
        best = int(score.argmax())
        v = (A[:, best] - _times(V[:, :k], V[best, :k])) / diagonal[best].clamp(min=1e-30).sqrt().float()
        x = errors * v
        along = _times(A, x) - _times(V[:, :k], _times(V[:, :k].T, x))
        gain += v.double() * (v.double() * (x * v).sum(dtype=torch.float64) - 2 * along)
        diagonal = diagonal - v.double().square()
        V[:, k] = v
        chosen.append(best)
    return torch.tensor(chosen, dtype=torch.int64, device=A.device)


def _times(A: Tensor, x: Tensor) -> Tensor:
    return matmul(A, x[:, None])[:, 0]


def alone(W: Tensor, *, salient: float, group: int, by_input: bool, means: bool = True) -> Rows:
    """Binarize ``W`` (m, n) fp32 by its weights alone: what is salient, and means and scales of the rest, by turns."""
    target = W.T.contiguous()
    n, m = target.shape
    chosen = torch.zeros_like(target, dtype=torch.bool)
    for _ in range(LOOKS + 1):
        cost = price_alone(on_weights(target, chosen, group, means=means))
        if by_input:
            cost = cost.sum(1, keepdim=True)
            kept = keep_exactly(cost, cost, n - count(salient, n), None)
        else:
            kept = keep_exactly(cost, target, n * m - count(salient, n * m), None)
        chosen = kept.expand(n, m).contiguous()
    return on_weights(target, chosen, group, means=means)
