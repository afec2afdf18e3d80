"""Blocked Cholesky and triangular inverse from matrix products: the same bits on any number of threads.

Only the small diagonal blocks go to LAPACK, whose kernels for up to 64 columns do not split work over threads;
everything else is a gemm, so the speed is that of the matrix product. In fp64 MKL's bits depend on the threads for more
shapes than in fp32, so that rare work is done on one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from compressor.methods.threads import matmul, one_thread, submul_

BLOCK = 64
STRIP = 512


class NotPositiveDefiniteError(ArithmeticError):
    """A pivot of the Cholesky factorization was not positive and finite."""


def cholesky_(A: Tensor, block: int = BLOCK) -> Tensor:
    """Overwrite the lower triangle of the symmetric ``A`` (n, n), fp32 or fp64, by L with L L^T = A.

    Left-looking: block column k first receives every update at once, then is divided by its diagonal block. The upper
    triangle is left as it was.

    Raises:
        NotPositiveDefiniteError: ``A`` is not positive definite in its own precision.
    """
    n = A.shape[0]
    failures = []
    for a in range(0, n, block):
        b = min(a + block, n)
        if a:
            submul_(A[a:, a:b], A[a:, :a], A[a:b, :a].T)
        L, info = torch.linalg.cholesky_ex(A[a:b, a:b].clone())
        failures.append(info)
        A[a:b, a:b] = L
        if b < n:
            A[b:, a:b] = matmul(A[b:, a:b], _small_inverse(L).T)
    if torch.stack(failures).any() or not torch.isfinite(A.diagonal()).all():
        raise NotPositiveDefiniteError("not positive definite")
    return A


def triangular_inverse_(L: Tensor, block: int = BLOCK) -> Tensor:
    """Overwrite the lower triangle of ``L`` (n, n) by that of L^-1, and the upper triangle by zeros.

    Block row k of the inverse is ``-L_kk^-1 L[k, :k] L^-1[:k, :k]``. The product is taken in strips of columns, because
    the rows above a strip's own are zero there.
    """
    n = L.shape[0]
    for a in range(0, n, block):
        b = min(a + block, n)
        inverse = _small_inverse(L[a:b, a:b].tril())
        row = L[a:b, :a].clone()
        for c in range(0, a, STRIP):
            d = min(c + STRIP, a)
            L[a:b, c:d] = -matmul(inverse, matmul(row[:, c:], L[c:a, c:d]))
        L[a:b, a:b] = inverse
        L[a:b, b:] = 0
    return L


def upper_inverse_factor(A: Tensor) -> Tensor:
    """Return U (n, n), upper triangular, with A^-1 = U^T U; ``A`` symmetric positive definite, not modified.

    The published way (SparseGPT, GPTQ) is Cholesky, inverse, Cholesky again. With J the reversal of the order, the one
    factorization J A J = L L^T gives A = R R^T with R = J L J upper triangular, and so U = R^-1 = J L^-1 J.

    Raises:
        NotPositiveDefiniteError: ``A`` is not positive definite in its own precision.
    """
    with _threads_for(A):
        return triangular_inverse_(cholesky_(A.flip(0, 1))).flip(0, 1)


def inverse(A: Tensor) -> Tensor:
    """Return A^-1 (n, n), symmetric up to rounding, of a symmetric positive definite ``A``.

    Raises:
        NotPositiveDefiniteError: ``A`` is not positive definite in its own precision.
    """
    with _threads_for(A):
        M = triangular_inverse_(cholesky_(A.clone()))
        out = torch.empty_like(M)
        for a in range(0, M.shape[0], STRIP):
            b = min(a + STRIP, M.shape[0])
            out[a:b, :b] = matmul(M[a:, a:b].T, M[a:, :b])
            out[:a, a:b] = out[a:b, :a].T
        return out


def _threads_for(A: Tensor) -> AbstractContextManager[None]:
    return one_thread() if A.dtype == torch.float64 and A.device.type == "cpu" else nullcontext()


def _small_inverse(L: Tensor) -> Tensor:
    eye = torch.eye(L.shape[0], dtype=L.dtype, device=L.device)
    out: Tensor = torch.linalg.solve_triangular(L, eye, upper=False)
    return out
