"""The best matrix of low rank in a metric of the inputs and one of the outputs, in closed form, with all that it drops.

For inputs with second moment H and an output error that costs e^T F e, the loss of W' is tr(F (W - W') H (W - W')^T).
With Q an orthonormal basis of W's outputs, W = Q R, and Q^T F Q = L L^T,

    L^T (R H R^T) L = V diag(s) V^T,    W'_k = Q L^-T V_k V_k^T L^T R,    loss of W'_k = sum of s beyond the first k

since tr(F E H E^T) is the plain squared error of L^T R H^(1/2), whose truncated SVD is the projection on V_k. Without F
this is W'_k = U_k U_k^T W with U the eigenvectors of W H W^T: what SVD-LLM (arXiv 2403.07378) computes by way of a
Cholesky factor of H and its inverse, but without either, so that a singular H does no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.methods.threads import one_thread

EXACT = 768
"""Matrices with a side no longer than this are taken apart in fp64, others in fp32, which takes less than half of the
time; at half of the components the two lose the same to within 0.1 %."""


@dataclass(frozen=True)
class Components:
    """A matrix W (m, n) as a sum of p = min(m, n) products ``left[:, i] right[i]``, the most important one first.

    Attributes:
        values: (p,) fp64, falling, not negative: what leaving out a component adds to the loss.
        left: (m, p) fp32.
        right: (p, n) fp32.
    """

    values: Tensor
    left: Tensor
    right: Tensor


def output_basis(weight: Tensor) -> Tensor | None:
    """Return an orthonormal basis (m, n) of the outputs of ``weight`` (m, n); None for all, where m <= n."""
    if weight.shape[0] <= weight.shape[1]:
        return None
    with one_thread():
        basis: Tensor = torch.linalg.qr(weight.to(_precision(weight))).Q
        return basis


def _precision(weight: Tensor) -> torch.dtype:
    return torch.float64 if min(weight.shape) <= EXACT else torch.float32


def in_basis(cost: Tensor, weight: Tensor) -> Tensor:
    """Return ``cost`` F (m, m), what errors at the outputs of ``weight`` cost, in the coordinates of `output_basis`.

    (p, p) fp32 with p = min(m, n): all that `components` wants to know of it.
    """
    Q = output_basis(weight)
    if Q is None:
        return cost.float()
    with one_thread():
        return (Q.T @ cost.to(Q.dtype) @ Q).float()


def weighing(cost: Tensor, weight: Tensor, damp: float) -> Callable[[Tensor], Tensor]:
    """Return the function X (m, r) -> F X, fp64, for the damped ``cost`` in the coordinates of `output_basis`."""
    Q = output_basis(weight)
    with one_thread():
        L = _root(cost.double(), damp)
        Q = None if Q is None else Q.double()

    def weigh(X: Tensor) -> Tensor:
        inner = L @ (L.T @ (X if Q is None else Q.T @ X))
        return inner if Q is None else Q @ inner

    return weigh


def components(
    weight: Tensor,
    hessian: Tensor | None,
    cost: Tensor | None = None,
    *,
    target: Tensor | None = None,
    damp: float = 0.01,
    rooted: bool = False,
) -> Components:
    """Take a matrix apart.

    Args:
        weight: W (m, n) fp32, whose outputs give the coordinates of ``cost``.
        hessian: H (n, n), of any scale, singular or not; None for the plain squared error of the weights.
        cost: F in the coordinates of `output_basis` (p, p); None: every error counts the same.
        target: (m, n) fp32, what is taken apart; by default W. Its columns must lie in the span of W's.
        damp: added to the diagonal of ``cost``, relative to its mean, since it is inverted.
        rooted: ``hessian`` is a symmetric root of H: by an SVD, exact also for the smallest components.
    """
    with one_thread():
        Q, dtype = output_basis(weight), _precision(weight)
        X = (weight if target is None else target).to(dtype)
        R = X if Q is None else Q.T @ X
        L = None if cost is None else _root(cost.to(dtype), damp)
        S = R if L is None else L.T @ R
        if rooted and hessian is not None:
            V, sizes, _ = torch.linalg.svd(S @ hessian.to(dtype), full_matrices=False)
            values = sizes.square()
        else:
            G = S @ S.T if hessian is None else S @ hessian.to(dtype) @ S.T
            values, vectors = torch.linalg.eigh((G + G.T) / 2)
            values, V = values.flip(0).clamp(min=0), vectors.flip(1)
        left = V if L is None else torch.linalg.solve_triangular(L.T, V, upper=True)
        return Components(values.double(), (left if Q is None else Q @ left).float(), (V.T @ S).float())


def _root(cost: Tensor, damp: float) -> Tensor:
    """The lower Cholesky factor of the damped ``cost`` (p, p); of the identity where nothing costs anything."""
    mean = float(cost.diagonal().mean())
    if not mean > 0:
        return torch.eye(len(cost), dtype=cost.dtype, device=cost.device)
    eye = torch.eye(len(cost), dtype=cost.dtype, device=cost.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex((cost + cost.T) / 2 + damp * mean * eye)
        if not int(failed):
            root: Tensor = factor
            return root
        damp *= 2
