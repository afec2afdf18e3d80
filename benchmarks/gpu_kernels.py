"""GPU kernels against bf16 matrices and cuBLAS: microseconds, GB/s and ratios, weights cold in cache.

    python -m benchmarks.gpu_kernels --output gpu_kernels.json [--sweep]

Each product runs on so many copies of its weights that they are several times the L2 cache, one after the other in one
CUDA graph; the time of a replay is divided by the copies. What rounds activations and adds up split sums is in it.
GB/s count the bytes of the weights alone. Ratios are within one run; the error is against the unpacked matrix in fp64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compressor.kernels.triton import supports
from compressor.kernels.triton.layouts import Planes, pack_fields
from compressor.kernels.triton.sparse_signs import SIGN_RUN, SparseSigns

SHAPES = ((2048, 2048), (4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192), (8192, 28672))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 512, 2048)
CACHES = 4  # copies of the weights are so many times the L2 cache at least
REPLAYS = 30
SWEEP = {
    "gemv": [(r, w, w // 128, s, k) for r in (4, 8, 16) for w in (128, 256, 512) for s in (1, 2) for k in (1, 2)],
    "gemm": [(r, 0, w, s, k) for r in (32, 64, 128) for w in (1, 2, 4, 8) for s in (2, 3, 4) for k in (1, 2, 4, 8)],
}
"""(rows, words, warps, stages, splits) that are tried with --sweep: tiles.py says what they are."""


def trits(m: int, n: int, planes: int = 2, run: int = 32, device: str = "cuda") -> Planes:
    """Random trit planes in groups of 128, laid out."""
    bytes_ = torch.randint(0, 256, (planes, m, n // 4), dtype=torch.uint8, device=device)
    bytes_ = bytes_ & ~((bytes_ & 0xAA) & ((bytes_ & 0x55) << 1))  # 3 is no trit: it becomes 1
    scale = (torch.rand(planes, m, n // 128, device=device) / n**0.5).half()
    return Planes(bytes_.view(torch.int32), scale, None, 1, 2, run, 128, n, torch.bfloat16)


def integers(m: int, n: int, bits: int = 4, device: str = "cuda") -> Planes:
    """Random integers in groups of 128, symmetric, laid out."""
    bytes_ = torch.randint(0, 256, (1, m, n * bits // 8), dtype=torch.uint8, device=device)
    scale = (torch.rand(1, m, n // 128, device=device) / n**0.5).half()
    offset = 0 if bits == 8 else 2 ** (bits - 1)
    return Planes(bytes_.view(torch.int32), scale, None, offset, bits, 16 * bits, 128, n, torch.bfloat16)


def signs(m: int, n: int, share: float = 0.1, device: str = "cuda") -> SparseSigns:
    """Random signs with salient weights of 8 bits, laid out."""
    salient = torch.rand(m, n, device=device) < share
    plus = (torch.rand(m, n, device=device) < 0.5) & ~salient
    column = salient.nonzero()[:, 1].int()
    starts = torch.nn.functional.pad(salient.sum(dim=1).cumsum(0), (1, 0)).int()
    scale = (torch.rand(m, n // 128, device=device) / n**0.5).half()
    return SparseSigns(
        pack_fields(plus.to(torch.uint8), 1, SIGN_RUN), scale, -scale.float(),
        column * 256 + torch.randint_like(column, 256), starts, (torch.rand(m, device=device) / n**0.5 / 64).half(),
        None, 128, False, 128, n, torch.bfloat16,
    )  # fmt: skip


MATRICES: dict[str, Callable[[int, int], Any]] = {
    "2 trit planes": trits,
    "int4": integers,
    "int2": lambda m, n: integers(m, n, 2),
    "int8": lambda m, n: integers(m, n, 8),
    "signs, 10 % salient": signs,
}


def copies_of(nbytes: int) -> int:
    """How many copies of weights exceed the cache by far."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-CACHES * cache // nbytes))


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one of ``calls``, all of them in one CUDA graph."""
    for call in calls[:2]:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(stop) / len(calls))
    return statistics.median(times[3:])


def read_bandwidth() -> float:
    """GB/s of a plain copy, counting what is read and what is written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds([lambda: target.copy_(source)]) / 1000


def relative_error(found: Any, x: Tensor, weight: Tensor) -> float:
    """Norm of the error against fp64, relative."""
    expected = x.double() @ weight.double().T
    return float((found.double() - expected).norm() / expected.norm())


def products(
    layouts: Sequence[Planes | SparseSigns], x: Tensor, exact: bool, tile: Sequence[int] = ()
) -> list[Callable[[], object]]:
    """One call for each copy of the weights."""
    from compressor.kernels.triton import ops

    return [partial(ops.linear, x, None, layout, exact=exact, tile=tile) for layout in layouts]


def rows(shapes: Sequence[tuple[int, int]], tokens: Sequence[int], names: Sequence[str], sweep: bool) -> Iterator[Any]:
    """Yield one result for each shape, matrix, number of tokens and mode."""
    for m, n in shapes:
        dense = [torch.randn(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(copies_of(2 * m * n))]
        x = {count: torch.randn(count, n, device="cuda", dtype=torch.bfloat16) for count in tokens}
        baseline = {count: microseconds([partial(F.linear, x[count], weight) for weight in dense]) for count in tokens}
        for count, time in baseline.items():
            yield {"matrix": "bf16", "shape": [m, n], "tokens": count, "us": time, "GB/s": 2 * m * n / time / 1000}
        del dense
        for name in names:
            first = MATRICES[name](m, n)
            layouts = [first, *(MATRICES[name](m, n) for _ in range(copies_of(first.nbytes) - 1))]
            weight = first.dense()
            for count, exact in ((count, exact) for count in tokens for exact in (False, True)):
                calls = products(layouts, x[count], exact)
                us = microseconds(calls)
                result = {
                    "matrix": name, "shape": [m, n], "tokens": count, "exact": exact, "us": us,
                    "GB/s": first.nbytes / us / 1000, "times bf16": baseline[count] / us,
                    "error": relative_error(calls[0](), x[count], weight),
                }  # fmt: skip
                if count == 1 and not exact and isinstance(first, Planes):
                    result["us by kernel"] = {
                        call.__name__: microseconds([partial(call, x[1], layout, None) for layout in layouts])
                        for call in one_token_kernels(first)
                    }
                if sweep and count <= 64:
                    kind = "gemv" if (not exact and count <= 2) or isinstance(first, SparseSigns) else "gemm"
                    result["tiles"] = swept(partial(products, layouts, x[count], exact), kind)
                yield result


def one_token_kernels(layout: Planes) -> list[Callable[..., object]]:
    """What can be called for one token: activations rounded in a launch of their own, or by every program."""
    from compressor.kernels.triton import launch

    return [launch.gemv, launch.fused_gemv] if launch.fusible(layout) else [launch.gemv]


def swept(calls: Callable[[Sequence[int]], list[Callable[[], object]]], kind: str) -> list[list[Any]]:
    """The five best tiles, as [microseconds, tile]."""
    found = []
    for tile in SWEEP[kind]:
        try:
            found.append([microseconds(calls(tile)), list(tile)])
        except Exception as error:  # too many registers or too much shared memory: not a tile for this GPU
            print(f"tile {tile}: {type(error).__name__}", file=sys.stderr)
    return sorted(found)[:5]


def main() -> None:
    """Measure, print a line a result, and write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_kernels.json"))
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--shapes", nargs="*", default=[f"{m}x{n}" for m, n in SHAPES], metavar="OUTxIN")
    parser.add_argument("--matrices", nargs="*", default=list(MATRICES), choices=list(MATRICES))
    parser.add_argument("--sweep", action="store_true", help="time other tiles too")
    options = parser.parse_args()
    reason = supports({"format": "trit-planes", "shape": [1, 128], "dtype": "bfloat16", "group": 128}, "cuda")
    if reason is not None:
        sys.exit(f"gpu_kernels: nothing to measure here: {reason}")
    shapes = [(int(m), int(n)) for m, n in (shape.split("x") for shape in options.shapes)]
    results = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy GB/s": read_bandwidth()}
    results["rows"] = []
    for row in rows(shapes, options.tokens, options.matrices, options.sweep):
        print(json.dumps(row), flush=True)
        results["rows"].append(row)
        options.output.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
