"""Trit planes from the weights alone: PTQTP as published, and the same alternation from many starts.

(Xiao et al., "PTQTP: Post-Training Quantization to Trit-Planes for Large Language Models", arXiv 2509.16989.)

Every group of a row is a problem of its own: x ~ sum_k a_k t_k. Weights stand in columns: X (c, M) holds c inputs of M
groups, scales are (K, M).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.methods.trit_levels import Levels, best_scales, canonical, times

STARTS: dict[int, list[tuple[float, ...]]] = {
    1: [(0.8,), (1.2,), (1.6,), (2.0,)],
    2: [(1.375, 1.1), (1.925, 1.1), (1.5, 0.5), (2.45, 1.4), (1.125, 0.9), (1.54, 1.4),
        (1.8, 0.75), (1.21, 1.1), (1.2, 0.3), (1.44, 0.6), (2.1, 1.4), (1.75, 1.4)],
    3: [(1.485, 0.825, 0.55), (1.38, 1.2, 1.0), (1.336, 0.891, 0.27), (1.397, 1.215, 0.45),
        (1.404, 0.78, 0.65), (1.8, 1.2, 0.8), (1.518, 0.66, 0.55), (1.418, 0.473, 0.45),
        (1.575, 1.5, 1.0), (1.104, 0.96, 0.8), (1.559, 1.485, 0.45), (1.087, 0.945, 0.35),
        (1.58, 1.215, 0.45), (1.328, 0.578, 0.55), (1.213, 1.155, 0.35), (1.732, 1.155, 0.35)],
}  # fmt: skip
"""K -> the scales that the alternation starts from, in units of the group's root mean square. Chosen one by one from a
grid, each so that the best end falls most, on groups of 128 weights: Gaussian, Laplace, Student's t and real ones."""

ALTERNATIONS = {1: 4, 2: 4, 3: 6}

PAPER_ITERATIONS = 50
PAPER_TOLERANCE = 1e-4
PAPER_RIDGE = 1e-8
PAPER_CONDITION = 1e6


def many_starts(X: Tensor, weights: Tensor, planes: int, finalists: int) -> Tensor:
    """Alternate between trits and scales from every start, for the loss sum_i d_i (x_i - q_i)^2.

    Args:
        X: (c, M) fp32.
        weights: d, (c, 1), positive.
        planes: K.
        finalists: how many of the ends to return.

    Returns:
        (K, F, M) fp32 in the stored form, those of the least loss first, of equals the earlier start's.
    """
    M = X.shape[1]
    starts = torch.tensor(STARTS[planes], dtype=X.dtype, device=X.device)
    rms = (weights * X.square()).sum(0).div_(weights.sum()).sqrt_()
    scale = (starts.T[:, :, None] * rms).reshape(planes, -1)
    many = X.repeat(1, len(starts))
    pull = weights * many
    for _ in range(ALTERNATIONS[planes]):
        levels = Levels.of(scale)
        scale = best_scales(levels.planes(levels.nearest_all(many)), weights, pull)
    scale = canonical(scale)
    loss = row_loss(many - nearest_values(many, scale), weights).view(-1, M)
    order = loss.sort(dim=0, stable=True).indices[:finalists]
    return scale.view(planes, -1, M).gather(1, order.expand(planes, -1, -1))


def nearest_values(X: Tensor, scale: Tensor) -> Tensor:
    """Return the level (c, M) nearest to each of ``X`` (c, M) under ``scale`` (K, M)."""
    levels = Levels.of(scale)
    return levels.value.gather(0, levels.nearest_all(X))


def row_loss(D: Tensor, metric: Tensor) -> Tensor:
    """Return d A d^T, (M,), for every column d of ``D`` (c, M) under the metric A (c, c), or (c, 1) for a diagonal."""
    return (D * times(metric, D)).sum(0)


def published(X: Tensor, planes: int) -> Tensor:
    """Return the scales (K, M) fp32 in the stored form that PTQTP's alternation ends with (algorithm 1).

    From T = sign(X) in all planes and scales of 1: the ridge solution for the scales, its lambda raised from 1e-8 by
    tens while the system's condition exceeds 1e6; then for every weight the nearest level; until the scales move by
    less than 1e-4, at most 50 times. A group stops on its own. Ties: see `Levels`.
    """
    scale = torch.ones(planes, X.shape[1], dtype=torch.float64, device=X.device)
    going = torch.arange(X.shape[1], device=X.device)
    trits = [X.sign()] * planes
    for _ in range(PAPER_ITERATIONS):
        solved = _ridge_scales(X[:, going], trits)
        moved = (solved - scale[:, going]).square().sum(0).sqrt()
        scale[:, going] = solved
        going = going[moved >= PAPER_TOLERANCE]
        if not len(going):
            break
        levels = Levels.of(scale[:, going].float())
        trits = levels.planes(levels.nearest_all(X[:, going]))
    return canonical(scale.float())


def _ridge_scales(X: Tensor, trits: list[Tensor]) -> Tensor:
    """Return (S^T S + lambda I)^-1 S^T x, (K, M) fp64, for S of ``trits`` K times (c, M) (eqs. 3 to 6)."""
    gram = torch.stack([torch.stack([(s * t).sum(0) for t in trits], dim=-1) for s in trits], dim=-2).double()
    right = torch.stack([(t * X).sum(0, dtype=torch.float64) for t in trits], dim=-1)
    ridge = torch.full(right.shape[:1], PAPER_RIDGE, dtype=torch.float64, device=X.device)
    eye = torch.eye(len(trits), dtype=torch.float64, device=X.device)
    while True:
        system = gram + ridge[:, None, None] * eye
        inverse = torch.linalg.inv(system)
        condition = system.square().sum((1, 2)).sqrt() * inverse.square().sum((1, 2)).sqrt()
        bad = (condition > PAPER_CONDITION) & (ridge < 1)
        if not bool(bad.any()):
            solved: Tensor = (inverse @ right[:, :, None])[:, :, 0].T
            return solved
        ridge = torch.where(bad, ridge * 10, ridge)
