"""The best matrix of low rank in the metric of the inputs: truncated SVD behind a whitening.

For A = C C^T the loss tr((E - X) A (E - X)^T) is the plain squared error of E C - X C, so that the best X of rank r is
the truncated SVD of E C, times C^-1 (SVD-LLM, arXiv 2403.07378, section 3.1). C is the inverse of the factor U of the
inverse: A^-1 = U^T U.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.methods.threads import matmul, one_thread

OVERSAMPLE = 8
POWER_STEPS = 4
EXACT = 256
"""Matrices with a side no longer than this are decomposed exactly: cheaper than iterating."""


def whitened_low_rank(error: Tensor, upper: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Return L (m, r) with orthonormal columns and R (r, n) such that L R is all but the best of rank r, both fp32.

    Args:
        error: E (m, n) fp32.
        upper: U (n, n) fp32, upper triangular, A^-1 = U^T U; None for the plain squared error.
        rank: r; not more than min(m, n).
    """
    with one_thread():
        white = error if upper is None else torch.linalg.solve_triangular(upper, error, upper=True, left=False)
    left = leading_columns(white, rank)
    right = matmul(left.T, white)
    return left, right if upper is None else matmul(right, upper)


def leading_columns(X: Tensor, rank: int) -> Tensor:
    """Return an orthonormal basis (m, r) of the leading left singular vectors of X (m, n), in falling order.

    Exact for small matrices; else by subspace iteration from a fixed start (Halko, Martinsson and Tropp, arXiv
    0909.4061, algorithm 4.4). The same bits on any number of threads.
    """
    m, n = X.shape
    width = min(rank + OVERSAMPLE, m, n)
    with one_thread():
        if min(m, n) <= EXACT:
            exact: Tensor = torch.linalg.svd(X, full_matrices=False).U
            return exact[:, :rank].contiguous()
        start = torch.randn(n, width, generator=torch.Generator().manual_seed(0)).to(X)
        Q = torch.linalg.qr(matmul(X, start)).Q
        for _ in range(POWER_STEPS):
            Z = torch.linalg.qr(matmul(X.T, Q)).Q
            Q = torch.linalg.qr(matmul(X, Z)).Q
        inner = torch.linalg.svd(matmul(Q.T, X), full_matrices=False).U
        return matmul(Q, inner[:, :rank])
