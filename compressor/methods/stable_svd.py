"""An SVD that can be differentiated where singular values are equal, or zero.

Its gradient divides by s_i^2 - s_j^2. As in Dobi-SVD (arXiv 2502.02723), where two singular values are closer than
`CLOSE` that quotient is a geometric series cut off after `TERMS` (arXiv 1906.09023, for eigenvectors),

    1 / (s_i^2 - s_j^2) = 1/s_i^2 (1 + q + q^2 + ...),    q = s_j^2 / s_i^2 <= 1,

which is (K + 1) / s_i^2 where they are equal, and `BOUND` where both are all but zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CLOSE = 1e-10
TERMS = 10
"""K: the series goes up to q^K."""

BOUND = 1e2


class _StableSvd(torch.autograd.Function):
    """The thin SVD, with a gradient that is finite wherever the gradients of U, S and V are."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        U, s, Vh = torch.linalg.svd(y, full_matrices=False)
        V = Vh.mT.contiguous()
        ctx.save_for_backward(U, s, V)
        return U, s, V

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        U, s, V = ctx.saved_tensors
        gU, gs, gV = gradients
        E = quotients(s)
        turn_u, turn_v = U.mT @ gU, V.mT @ gV
        inner = E * (turn_u - turn_u.mT) * s[..., None, :] + s[..., :, None] * E * (turn_v - turn_v.mT)
        inverse = torch.where(s > CLOSE, 1 / s.clamp(min=CLOSE), 0.0)
        outside_u = (gU - U @ turn_u) * inverse[..., None, :]
        outside_v = (gV - V @ turn_v) * inverse[..., None, :]
        gradient: Tensor = (U @ (inner + torch.diag_embed(gs)) + outside_u) @ V.mT + U @ outside_v.mT
        return gradient


def quotients(s: Tensor) -> Tensor:
    """Return 1 / (s_j^2 - s_i^2) at (..., i, j), as stabilised, for falling ``s`` (..., k); zero on the diagonal."""
    rows, columns = s[..., :, None], s[..., None, :]
    large, small = torch.maximum(rows, columns), torch.minimum(rows, columns)
    both_zero, close = large < CLOSE, large - small <= CLOSE
    safe = large.clamp(min=CLOSE)
    q = (small / safe).square()
    series = torch.ones_like(q)
    for _ in range(TERMS):
        series = 1 + q * series
    plain = 1 / torch.where(close, 1.0, (large - small) * (large + small))
    found = torch.where(both_zero, BOUND, torch.where(close, series / safe.square(), plain))
    return torch.triu(-found, 1) + torch.tril(found, -1)


def stable_svd(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (..., T, k), s (..., k) falling and V (..., m, k) with ``y`` (..., T, m) = U diag(s) V^T, k = min(T, m).

    Differentiable, finite also where singular values are equal or zero.
    """
    found: tuple[Tensor, Tensor, Tensor] = _StableSvd.apply(y)  # type: ignore[no-untyped-call]
    return found
