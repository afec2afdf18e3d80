"""The published algorithms, written down slowly and plainly, in fp64: what the fast code is held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def correlated(m: int, n: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor, int]:
    """Return a weight (m, n), the Hessian (n, n) of inputs with a power-law spectrum and uneven scales, the tokens."""
    g = torch.Generator().manual_seed(seed)
    t = tokens or 4 * n
    spectrum = torch.arange(1, n + 1) ** -0.5 * (n**0.5) / 2
    basis = torch.linalg.qr(torch.randn(n, n, generator=g))[0]
    x = (torch.randn(t, n, generator=g) * spectrum) @ basis + 0.3 * torch.randn(t, n, generator=g)
    x *= torch.exp(0.5 * torch.randn(n, generator=g))
    weight = torch.randn(m, n, generator=g) * torch.exp(0.2 * torch.randn(m, 1, generator=g))
    return weight, x.T @ x, t


def damped(H: Tensor, damp: float) -> Tensor:
    """H in fp64 with the ordinary damping; for a Hessian without dead inputs."""
    H = H.double()
    return H + damp * H.diagonal().mean() * torch.eye(H.shape[0], dtype=torch.float64)


def published_factor(H: Tensor, damp: float) -> Tensor:
    """Cholesky, inverse, Cholesky."""
    return torch.linalg.cholesky(torch.linalg.inv(damped(H, damp)), upper=True)


def smallest(scores: list[tuple[float, float, int]], k: int) -> list[int]:
    """The indices of the k smallest of (score, magnitude, index)."""
    return [index for _, _, index in sorted(scores)[:k]]


def sweep(
    W: Tensor, U: Tensor, choose: Callable[[int, Tensor], None], settle: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Column by column over the whole width, nothing delayed: ``choose`` looks, ``settle`` gives the final column."""
    W = W.double().clone()
    U = U.double()
    for j in range(W.shape[1]):
        choose(j, W)
        q = settle(j, W[:, j])
        e = (W[:, j] - q) / U[j, j]
        W[:, j] = q
        W[:, j + 1 :] -= torch.outer(e, U[j, j + 1 :])
    return W


def sparsegpt(
    W: Tensor, U: Tensor, *, counts: list[int] | None = None, block: int = 128, pattern: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """SparseGPT with ``counts[i]`` weights pruned from tile i, or N:M; returns (Q, mask)."""
    m, n = W.shape
    keep = torch.ones(m, n, dtype=torch.bool)
    d = U.double().diagonal()

    def choose(j: int, now: Tensor) -> None:
        if pattern is not None:
            if j % pattern[1] == 0:
                for i in range(m):
                    group = range(j, j + pattern[1])
                    scores = [(float((now[i, k] / d[k]) ** 2), abs(float(now[i, k])), k) for k in group]
                    keep[i, smallest(scores, pattern[1] - pattern[0])] = False
        elif counts is not None and j % block == 0:
            end = min(j + block, n)
            tile = [
                (float((now[i, k] / d[k]) ** 2), abs(float(now[i, k])), k * m + i)
                for k in range(j, end)
                for i in range(m)
            ]
            for index in smallest(tile, counts[j // block]):
                keep[index % m, index // m] = False

    return sweep(W, U, choose, lambda j, w: w * keep[:, j]), keep


def least_squares(W: Tensor, mask: Tensor, A: Tensor) -> Tensor:
    """The exact optimum on a mask, one linear system per row."""
    out = torch.zeros_like(W, dtype=torch.float64)
    for i in range(W.shape[0]):
        s = mask[i].nonzero().flatten()
        out[i, s] = torch.linalg.solve(A[s][:, s], A[s] @ W[i].double())
    return out


def quadratic(W: Tensor, Q: Tensor, H: Tensor) -> float:
    D = W.double() - Q.double()
    return float(torch.trace(D @ H.double() @ D.T))
