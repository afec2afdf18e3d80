"""Least-squares refit of the kept weights on a fixed mask, by preconditioned conjugate gradients.

For every row q of Q, with support S, min (w - q) A (w - q)^T / 2 over q_S, where A is the damped Hessian: the rows are
independent problems that share A, so that one step of all of them is one matrix product. (The last stage of ALPS, Meng
et al., arXiv 2406.07831, here after any mask.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compressor.methods.result import Pruned
from compressor.methods.settings import PruneSettings
from compressor.methods.statistics import InputStatistics
from compressor.methods.threads import matmul

TOLERANCE = 1e-3


def refit(
    weight: Tensor,
    start: Tensor,
    mask: Tensor,
    hessian: Tensor,
    shift: float,
    iterations: int = 20,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Return Q (m, n), zero outside ``mask``, at least as close to ``weight`` (m, n) as ``start`` (m, n), row by row.

    Close is measured by H = ``hessian`` (n, n) and by H + ``shift`` I; a row that CG did not improve in both keeps
    its start. A row stops when its preconditioned residual has shrunk by ``tolerance``.
    """
    M = mask.to(weight.dtype)
    start = start.masked_fill(~mask, 0)
    diagonal = hessian.diagonal() + shift
    Q = start.clone()

    def times_a(P: Tensor) -> Tensor:
        return torch.addcmul(matmul(P, hessian), P, torch.full_like(P[:1, :1], shift))

    R = times_a(weight - Q).mul_(M)
    Z = R / diagonal
    P = Z.clone()
    rz = (R * Z).sum(1, keepdim=True)
    goal = rz * tolerance**2
    for _ in range(iterations):
        going = rz > goal
        if not bool(going.any()):
            break
        AP = times_a(P).mul_(M)
        curvature = (P * AP).sum(1, keepdim=True)
        alpha = torch.where(going & (curvature > 0), rz / curvature, 0.0)
        Q.addcmul_(P, alpha)
        R.addcmul_(AP, alpha, value=-1)
        torch.div(R, diagonal, out=Z)
        before, rz = rz, (R * Z).sum(1, keepdim=True)
        P = torch.addcmul(Z, P, torch.where(going, rz / before, 0.0))
    better = _better(weight, start, Q, hessian, shift)[:, None]
    return torch.where(better, Q, start).masked_fill_(~mask, 0)


def _better(weight: Tensor, start: Tensor, end: Tensor, hessian: Tensor, shift: float) -> Tensor:
    """(m,) bool: rows of ``end`` no worse than those of ``start`` with and without the damping."""

    def losses(Q: Tensor) -> tuple[Tensor, Tensor]:
        D = weight - Q
        loss = (matmul(D, hessian) * D).sum(1, dtype=torch.float64)
        return loss, loss + shift * D.square().sum(1, dtype=torch.float64)

    (plain, damped), (plain_start, damped_start) = losses(end), losses(start)
    return (plain <= plain_start) & (damped <= damped_start)


def refit_if_asked(
    pruned: Pruned,
    weight: Tensor,
    stats: InputStatistics | None,
    settings: PruneSettings,
    frozen: Tensor | None,
) -> Pruned:
    """Refit ``pruned`` to the dense ``weight`` (m, n) when the settings say so and there is data; else return it.

    ``frozen`` (m, n) bool: stays zero, also where an N:M mask counts it as kept.
    """
    if not settings.refit:
        return pruned
    if stats is None:
        return replace(pruned, notes=(*pruned.notes, "no usable input statistics: not refitted"))
    mask = pruned.mask if frozen is None else pruned.mask & ~frozen
    Q = refit(weight, pruned.weight, mask, stats.hessian, stats.shift(settings.damp), settings.refit_iterations)
    return replace(pruned, weight=Q)
