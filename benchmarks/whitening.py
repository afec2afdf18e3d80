"""Seconds and memory of the best matrix of low rank, by our closed form and by the published whitening route.

``python -m benchmarks.whitening [--shapes 1024x1024 2816x1024] [--repeats 1] [--print-only]``. Every case is a process
of its own, which gets the same weight and second moment as its neighbours; the ways take turns, and the fastest of each
counts. Seconds are of the computation alone; peak memory is the process's, beside one that only makes the problem.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.child import run_child
from benchmarks.sections import ROOT, machine_line, number, table, write_section

SHAPES = ("1024x1024", "2048x2048", "4096x4096", "2816x1024", "1024x2816")
REPEATED_BELOW = 4096
"""Cases with a larger side are run once."""

KEEP = 0.6  # of the parameters
WAYS = ("nothing", "published", "ours", "ours, weighted")
SINGULAR = "1024x1024 singular"
"""As if of half as many tokens as inputs, where the published route has to repair its second moment."""


def published(W: Any, H: Any, rank: int) -> tuple[Any, Any]:
    """SVD-LLM step by step as its authors' program does it: (m, rank) and (rank, n) fp32."""
    import torch

    raw = H.double()
    try:
        S = torch.linalg.cholesky(raw)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        least = torch.linalg.eigvalsh(raw)[0]
        raw += (-least + 1e-6) * torch.eye(len(raw), dtype=raw.dtype)
        S = torch.linalg.cholesky(raw)
    S = S.float()
    try:
        inverse = torch.linalg.inv(S)
    except RuntimeError:
        S += 1e-6 * torch.eye(len(S))
        inverse = torch.linalg.inv(S)
    U, values, V = torch.linalg.svd(W @ S, full_matrices=False)
    root = torch.diag(values[:rank]).sqrt()
    return U[:, :rank] @ root, root @ (V[:rank] @ inverse)


def ours(W: Any, H: Any, rank: int, cost: Any = None) -> tuple[Any, Any]:
    """The same by this project: all components, as a decomposition takes them, and the first ``rank`` of them."""
    from compressor.methods.decompose_settings import SvdLlmSettings
    from compressor.methods.decomposers import take_apart
    from compressor.methods.statistics import InputStatistics

    parts = take_apart(W, InputStatistics(H, 1), SvdLlmSettings(), cost)
    return parts.left[:, :rank], parts.right[:rank]


def problem(m: int, n: int, tokens: int) -> tuple[Any, Any]:
    """A weight (m, n) and the second moment (n, n) of ``tokens`` correlated inputs of uneven scale."""
    import torch

    g = torch.Generator().manual_seed(n)
    mix = torch.randn(64, n, generator=g) * (torch.arange(1, n + 1) ** -0.5)
    scale = torch.exp(0.5 * torch.randn(n, generator=g))
    H = torch.zeros(n, n)
    for start in range(0, tokens, 512):
        rows = min(512, tokens - start)
        x = (torch.randn(rows, 64, generator=g) @ mix + 0.3 * torch.randn(rows, n, generator=g)) * scale
        H.addmm_(x.T, x)
    return torch.randn(m, n, generator=g), H


def kept_rank(m: int, n: int) -> int:
    """The rank that keeps ``KEEP`` of the parameters."""
    return int(KEEP * m * n / (m + n))


def one_case(way: str, shape: str) -> dict[str, float]:
    """Run one way in this process: seconds, peak bytes, and the part of the outputs' second moment that is lost."""
    import torch

    from compressor.methods.quadratic import layer_error

    m, n = (int(side) for side in shape.split()[0].split("x"))
    W, H = problem(m, n, n // 2 if "singular" in shape else 2 * n)
    rank, side = kept_rank(m, n), min(m, n)
    cost = problem(1, side, 2 * side)[1] if way == "ours, weighted" else None
    ways: dict[str, Callable[[], tuple[Any, Any]]] = {
        "nothing": lambda: (torch.zeros(m, 1), torch.zeros(1, n)),
        "published": lambda: published(W, H, rank),
        "ours": lambda: ours(W, H, rank),
        "ours, weighted": lambda: ours(W, H, rank, cost),
    }
    torch.linalg.svd(torch.eye(16) + torch.linalg.inv(torch.eye(16)))  # loads the library
    torch.linalg.eigh(torch.eye(16, dtype=torch.float64))
    began = time.perf_counter()
    left, right = ways[way]()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "peak": peak, "error": layer_error(W, left @ right, H)[1]}


def case(way: str, shape: str) -> dict[str, float]:
    """The same in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    done = run_child([sys.executable, "-m", "benchmarks.whitening", "--case", way, shape], cwd=ROOT)
    if done.code:
        raise RuntimeError(f"{way}, {shape}: exit code {done.code}\n{done.errors[-2000:]}")
    found: dict[str, float] = json.loads(done.output.splitlines()[-1])
    return found


def measured(shape: str, repeats: int) -> dict[str, dict[str, float]]:
    """Way -> its fastest run, the ways taking turns."""
    times = repeats if max(int(side) for side in shape.split()[0].split("x")) < REPEATED_BELOW else 1
    best: dict[str, dict[str, float]] = {}
    for _ in range(times):
        for way in WAYS:
            found = case(way, shape)
            if way not in best or found["seconds"] < best[way]["seconds"]:
                best[way] = found
            print(f"{shape} {way}: {found}", flush=True)
    return best


def row(shape: str, found: dict[str, dict[str, float]]) -> list[str]:
    """One line of the table."""
    seconds = {way: found[way]["seconds"] for way in WAYS}
    memory = [f"{(found[way]['peak'] - found['nothing']['peak']) / 1e6:.0f} MB" for way in WAYS[1:]]
    errors = [f"{found[way]['error']:.6f}" for way in ("published", "ours")]
    ratios = [f"{number(seconds['published'] / seconds[way])} x" for way in WAYS[2:]]
    return [shape, *(f"{seconds[way]:.2f} s" for way in WAYS[1:]), *ratios, *memory, *errors]


def verdicts(results: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Where the closed form is faster, where it takes less memory, and what each lost."""
    sentences = []
    for shape, found in results.items():
        old, new = found["published"], found["ours"]
        bare = found["nothing"]["peak"]
        fast = "faster" if new["seconds"] < old["seconds"] else "**slower**"
        less = "less" if new["peak"] < old["peak"] else "**more**"
        memory = f"{less} memory ({(new['peak'] - bare) / 1e6:.0f} against {(old['peak'] - bare) / 1e6:.0f} MB)"
        ratio = max(new["seconds"], old["seconds"]) / min(new["seconds"], old["seconds"])
        lost = f"lost {new['error']:.6f} against {old['error']:.6f}"
        sentences.append(f"{shape}: {fast} by x{ratio:.2f}, {memory}; {lost}.")
    return sentences


def section(results: dict[str, dict[str, dict[str, float]]], repeats: int) -> str:
    """The whole section."""
    heads = ["weight", "published", "ours", "ours, weighted", "ratio", "ratio, weighted"]
    heads += ["memory, published", "ours", "ours, weighted", "lost, published", "ours"]
    return "\n\n".join(
        [
            "## Low rank: the closed form against the published whitening",
            f"One weight at {KEEP:.0%} of its parameters: Cholesky factor of the second moment in fp64 (with the "
            "repair of the authors' program), its inverse and an SVD in fp32, as published, against the eigenvectors "
            "of W H W^T (in fp32 for sides above 768); weighted: with what errors cost at the loss, as by default. "
            "Seconds and peak memory of processes of their own, what making the problem takes not counted; the "
            f"fastest of {repeats} runs in turns ({REPEATED_BELOW} and above: of one). "
            "The published route runs on all threads, ours on one, so that its bits do not depend on their number. "
            "Lost: tr((W-Q) H (W-Q)^T) / tr(W H W^T).",
            table(heads, [row(shape, found) for shape, found in results.items()]),
            "\n".join(f"- {sentence}" for sentence in verdicts(results)),
            machine_line(f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads for the published route"),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and renew the section of docs/benchmarks.md unless told to print only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES, SINGULAR])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--case", nargs=2, metavar=("WAY", "SHAPE"), help="run one case in this process, for itself")
    parser.add_argument("--print-only", action="store_true")
    options = parser.parse_args(argv)
    if options.case:
        print(json.dumps(one_case(*options.case)))
        return
    text = section({shape: measured(shape, options.repeats) for shape in options.shapes}, options.repeats)
    if options.print_only:
        print(text)
    else:
        write_section("whitening", text)


if __name__ == "__main__":
    main()
