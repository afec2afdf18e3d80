"""ALPS: pruning by ADMM (Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning", 2406.07831).

min tr((W - B) A (W - B)^T) / 2 over sparse B, split as B = D with D sparse, in coordinates where the damped Hessian A
has a unit diagonal (inputs divided by, weights multiplied by sqrt(A_jj)), so that magnitudes compare across columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.methods import masks
from compressor.methods.cholesky import NotPositiveDefiniteError, inverse
from compressor.methods.magnitude import target, without_data, zeroed
from compressor.methods.refit import refit_if_asked
from compressor.methods.result import Pruned
from compressor.methods.settings import AdmmSettings
from compressor.methods.statistics import FactorizationError, InputStatistics, check_finite, damped
from compressor.methods.threads import matmul

EVERY = 3
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def solve(
    weight: Tensor,
    stats: InputStatistics | None,
    settings: AdmmSettings,
    sparsity: float | None,
    frozen: Tensor | None = None,
) -> Pruned:
    """Find mask and weights of ``weight`` (m, n) fp32 together; then, unless told otherwise, refit on that mask.

    The count is exact over the whole matrix, or by N:M groups. Without ``stats``, magnitude.

    Raises:
        FactorizationError: the Hessian is not finite, or too ill-conditioned for fp64.
        UserError: the pattern does not divide n.
    """
    if stats is None:
        return without_data(weight, settings, sparsity, frozen, "admm")
    check_finite(stats.hessian)
    A = damped(stats.hessian, settings.damp)
    unit = A.diagonal().sqrt()
    A.div_(unit).div_(unit[:, None])
    projection = _Projection(settings, sparsity, frozen, weight)
    B, mask, done = _iterate(weight * unit, A, projection, settings)
    notes = () if done else (f"ADMM had not settled its mask after {settings.iterations} iterations",)
    pruned = Pruned(zeroed(B.div_(unit), mask, frozen), mask, notes=notes)
    return refit_if_asked(pruned, weight, stats, settings, frozen)


class _Projection:
    """Which entries the nearest sparse matrix keeps: the largest of all, or of every group."""

    def __init__(self, settings: AdmmSettings, sparsity: float | None, frozen: Tensor | None, weight: Tensor) -> None:
        self.group = settings.group
        self.frozen = frozen
        self.pruned = 0 if self.group else masks.count(target(sparsity, settings), weight.numel())
        self.kept = weight.numel() * self.group[0] // self.group[1] if self.group else weight.numel() - self.pruned

    def __call__(self, Z: Tensor) -> Tensor:
        score = Z.abs()
        if self.group is not None:
            return masks.keep_pattern(score, score, *self.group, self.frozen)
        return masks.keep_exactly(score, score, self.pruned, self.frozen)


def _iterate(W: Tensor, A: Tensor, keep: _Projection, settings: AdmmSettings) -> tuple[Tensor, Tensor, bool]:
    """Return B (m, n), its mask, and whether the mask had settled; algorithm 1 of the paper with its rho schedule.

    (A + rho I)^-1 is computed anew whenever rho changes. That costs 5/3 n^3 multiplications every third iteration, and
    an iteration then m n^2; the paper's one eigendecomposition makes every iteration cost 2 m n^2, and is slower from
    m = n/2 on.
    """
    Y = matmul(W, A)
    rho = settings.rho
    left = settings.iterations
    while True:
        V = torch.zeros_like(W)
        D = W
        support = torch.ones_like(W, dtype=torch.bool)
        grown = False
        inverted = _inverse(A, rho)
        for t in range(1, left + 1):
            B = matmul((Y - V).add_(D, alpha=rho), inverted)
            Z = torch.add(B, V, alpha=1 / rho)
            mask = keep(Z)
            D = Z * mask
            V.add_(B - D, alpha=rho)
            if t % EVERY:
                continue
            changed = int((mask ^ support).sum()) / max(keep.kept, 1)
            support = mask
            if changed == 0:
                break
            rho *= next(factor for above, factor in GROWTH if changed > above)
            grown = True
            inverted = _inverse(A, rho)
        else:
            return B, keep(B), False
        left -= t
        if grown or left < EVERY:
            return B, keep(B), True
        rho /= 5  # the mask never moved: the penalty was too strong to let it


def _inverse(A: Tensor, rho: float) -> Tensor:
    shifted = A.clone()
    shifted.diagonal().add_(rho)
    for dtype in (torch.float32, torch.float64):
        try:
            return inverse(shifted.to(dtype)).float()
        except NotPositiveDefiniteError:
            continue
    raise FactorizationError("the Hessian of this input is too ill-conditioned for ADMM, in fp64 too")
