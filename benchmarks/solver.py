"""Seconds of SparseGPT's solve (factorization and sweep) against a plain rendering of the published loop, in one run.

``python -m benchmarks.solver [--sizes 1024 2048 4096] [--repeats 3] [--print-only]``. Both get the same weight and
Hessian; neither's time includes summing up the Hessian. The two take turns, and the fastest of each counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.sections import machine_line, number, table, write_section
from compressor.methods.quadratic import layer_error
from compressor.methods.settings import SparseGPTSettings
from compressor.methods.table import InputStatistics, solve

DAMP, BLOCK, SPARSITY = 0.01, 128, 0.5


def published(W: Tensor, H: Tensor) -> Tensor:
    """SparseGPT step by step as its authors describe it: three factorizations, then one column at a time."""
    m, n = W.shape
    W, H = W.clone(), H.clone()
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(DAMP * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    losses = torch.zeros(m)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        tile, u = W[:, start:end].clone(), U[start:end, start:end]
        settled, errors, loss = torch.zeros_like(tile), torch.zeros_like(tile), torch.zeros_like(tile)
        score = tile**2 / u.diagonal() ** 2
        threshold = score.flatten().sort().values[int(score.numel() * SPARSITY)]
        pruned = score <= threshold
        for j in range(end - start):
            w, d = tile[:, j], u[j, j]
            q = w.clone()
            q[pruned[:, j]] = 0
            settled[:, j] = q
            loss[:, j] = (w - q) ** 2 / d**2
            error = (w - q) / d
            tile[:, j:] -= error[:, None] @ u[j, j:][None]
            errors[:, j] = error
        W[:, start:end] = settled
        losses += loss.sum(1) / 2
        W[:, end:] -= errors @ U[start:end, end:]
    return W


def ours(W: Tensor, H: Tensor) -> Tensor:
    """The same by this project, factorization included."""
    settings = SparseGPTSettings(sparsity=SPARSITY, damp=DAMP, block=BLOCK, refit=False)
    return solve("sparsegpt", W, InputStatistics(H, 1), settings).weight


def problem(n: int) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs of uneven scale, both (n, n)."""
    g = torch.Generator().manual_seed(n)
    mix = torch.randn(n, n, generator=g) * (torch.arange(1, n + 1) ** -0.5)[:, None]
    x = torch.randn(2 * n, n, generator=g) @ mix + 0.3 * torch.randn(2 * n, n, generator=g)
    x *= torch.exp(0.5 * torch.randn(n, generator=g))
    return torch.randn(n, n, generator=g), x.T @ x


def timed(function: Callable[[Tensor, Tensor], Tensor], W: Tensor, H: Tensor) -> tuple[float, Tensor]:
    """Seconds of one call, and its result."""
    start = time.perf_counter()
    result = function(W, H)
    return time.perf_counter() - start, result


def row(n: int, repeats: int) -> list[str]:
    """One line of the table."""
    W, H = problem(n)
    theirs, mine = [], []
    for _ in range(repeats):
        theirs.append(timed(published, W, H))
        mine.append(timed(ours, W, H))
    slow, fast = min(t for t, _ in theirs), min(t for t, _ in mine)
    errors = [layer_error(W, runs[0][1], H)[1] for runs in (theirs, mine)]
    return [f"{n} x {n}", f"{slow:.2f} s", f"{fast:.2f} s", f"{number(slow / fast)} x", *(f"{e:.6f}" for e in errors)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and renew the section of docs/benchmarks.md unless told to print only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--print-only", action="store_true")
    options = parser.parse_args(argv)
    solve("sparsegpt", *_warm_up(), SparseGPTSettings())
    rows = [row(n, options.repeats) for n in options.sizes]
    header = ["weight", "published loop", "compressor", "ratio", "relative error, published", "relative error, ours"]
    text = "\n\n".join(
        [
            "## The solver alone",
            f"SparseGPT at {SPARSITY:.0%}, block {BLOCK}: factorization and sweep of one weight, the fastest of "
            f"{options.repeats} alternating runs. The published loop is in `benchmarks/solver.py`. Relative error: "
            "tr((W-Q) H (W-Q)^T) / tr(W H W^T); the published threshold prunes one weight more per block of columns.",
            table(header, rows),
            machine_line(f"{torch.get_num_threads()} torch threads"),
        ]
    )
    if options.print_only:
        print(text)
    else:
        write_section("solver", text)


def _warm_up() -> tuple[Tensor, InputStatistics]:
    return torch.ones(64, 64), InputStatistics(torch.eye(64), 1)


if __name__ == "__main__":
    main()
