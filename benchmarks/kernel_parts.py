"""What benchmarks/kernels.py measures of single products: by shape, by tokens, on two threads, while loading."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from benchmarks.ggml_process import Ggml
from benchmarks.kernel_matrices import (
    DENSE,
    FORMATS,
    GROUP,
    LOW_RANK,
    PARTIAL,
    PLANES,
    SPARSE,
    Packed,
    random_packed,
    rotation,
)
from benchmarks.kernel_timing import CPU, WALL, Clock, Contender, busy, interleave, timed
from compressor.kernels.matrix import DTYPES, Matrix
from compressor.kernels.native import LEVELS, Native, native
from compressor.kernels.products import Product, make_product

READ, TORCH, TORCH_FP32, INT4PACK = "plain read of memory", "torch bf16", "torch fp32", "torch int4pack, groups of 128"
DIRECT = "2 trit planes, called without PyTorch"
Q4, Q4_PLAIN = "llama.cpp Q4_0, repacked", "llama.cpp Q4_0, as in the file"
GGML = {Q4: ("q4_0", "repack"), Q4_PLAIN: ("q4_0", "plain"), "llama.cpp BF16": ("bf16", "plain"),
        "llama.cpp TQ2_0 (one plane)": ("tq2_0", "plain")}  # fmt: skip
"""Name -> type and buffer there."""

CALLS = 3  # of which the last is timed
PAUSE = 0.006  # seconds before products on several threads: those of the one before go on spinning for some time
LONG = 0.01  # seconds of a call that needs none before it
PLACES = 4  # times that all is made anew, in other memory
PATIENCE = 0.015  # seconds of a call, for one token, that is not worth a place in every round


@dataclass
class Setup:
    """What all contenders of one measurement share.

    Attributes:
        m, n, tokens, threads: of the products.
        memory: bytes of copies through which weights rotate.
        ggml: llama.cpp's process, if there is one.
        wall: whether one thread is timed by the clock on the wall, too.
    """

    m: int
    n: int
    tokens: int
    threads: int
    memory: int
    ggml: Ggml | None = None
    wall: bool = False

    @property
    def clock(self) -> Clock:
        """Processor time for one thread, wall time for more."""
        return CPU if self.threads == 1 and not self.wall else WALL

    def contender(self, name: str, work: Any, nbytes: int, **facts: Any) -> Contender:
        """Something of ours or of PyTorch's, on so many threads: of several calls the last is timed.

        As in a model, products follow products: what comes after a slow computation in the cache starts slower, since
        the way to memory has gone to sleep meanwhile. A call of many milliseconds does not notice.
        """
        last = [0.0]

        def once() -> float:
            torch.set_num_threads(self.threads)
            if self.clock is WALL:
                time.sleep(PAUSE)
            for _ in range(CALLS - 1 if last[0] < LONG or self.clock is WALL else 0):
                work()
            last[0] = timed(work, self.clock)()
            return last[0]

        return Contender({"name": name, "threads": self.threads, **facts}, once, nbytes)

    def activations(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Random inputs (tokens, n)."""
        return torch.randn(self.tokens, self.n, dtype=dtype)


def kernels() -> Native:
    """The compiled kernels.

    Raises:
        SystemExit: there are none.
    """
    found = native()
    if found is None:
        raise SystemExit("kernels: they are not compiled; run `compressor kernels build`")
    return found


def levels() -> list[str]:
    """Instruction sets to measure: what this processor has beyond plain C++, best first."""
    return [*reversed(kernels().levels[1:])]


def read(s: Setup) -> Contender:
    """Memory as large as two trit planes, read once."""
    size = s.m * s.n * 17 // 32 // 64 * 64
    copies = rotation(torch.zeros(size, dtype=torch.uint8), size, s.memory)
    found = kernels()
    return s.contender(
        READ, lambda: found.module.read_memory(next(copies).data_ptr(), size, s.threads, found.best), size
    )


def torch_linear(s: Setup, dtype: torch.dtype = torch.bfloat16) -> Contender:
    """PyTorch's own product."""
    weight = torch.randn(s.m, s.n, dtype=dtype)
    copies, x = rotation(weight, weight.nbytes, s.memory), s.activations(dtype)
    name = TORCH if dtype is torch.bfloat16 else TORCH_FP32
    return s.contender(name, lambda: F.linear(x, next(copies)), weight.nbytes)


def int4pack(s: Setup) -> Contender:
    """PyTorch's product with 4-bit codes."""
    codes = torch.randint(0, 16, (s.m, s.n), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scale = torch.randn(s.n // GROUP, s.m, 2).bfloat16()
    nbytes, x = packed.nbytes + scale.nbytes, s.activations()
    copies = rotation(packed, nbytes, s.memory)
    scales = rotation(scale, nbytes, s.memory)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return s.contender(INT4PACK, lambda: product(x, next(copies), GROUP, next(scales)), nbytes)


def ours(s: Setup, name: str, packed: Packed, chosen: Sequence[str], exact: Sequence[bool]) -> list[Contender]:
    """One format, by each instruction set, with rounded and with exact activations; all share their copies.

    So a copy that one of them has read comes to the next only after all others.
    """
    spec, parts = packed
    # made for another instruction set, a byte for every 128 weights may have another value: as many are read
    made = make_product(parts, spec, levels()[-1])
    copies, x = rotation(made, made.nbytes, s.memory), s.activations()

    def contender(level: str, mode: bool) -> Contender:
        def work() -> torch.Tensor:
            return next(copies).product(x, None, level, mode)

        return s.contender(name, work, made.nbytes, level=level, exact=mode)

    return [contender(level, mode) for mode in exact for level in chosen]


def direct(s: Setup, packed: Packed, level: str) -> Contender:
    """Two trit planes by the native entry point: what `Matrix.product` adds is the difference."""
    product: Product = make_product(packed[1], packed[0], level)
    assert isinstance(product, Matrix)
    copies: Iterator[Matrix] = rotation(product, product.nbytes, s.memory)
    x, out, linear = s.activations(), torch.empty(s.tokens, s.m, dtype=torch.bfloat16), kernels().module.linear

    def work() -> None:  # holds the tensors whose addresses it passes
        ends = (x.data_ptr(), DTYPES[x.dtype], s.tokens, out.data_ptr(), 0, 0, s.threads, LEVELS.index(level))
        linear(*next(copies).arguments, *ends)

    return s.contender(DIRECT, work, product.nbytes, level=level, exact=False)


def theirs(s: Setup, name: str) -> Contender:
    """A product of llama.cpp, timed by itself: of as many calls the last."""
    assert s.ggml is not None
    ggml, (kind, layout) = s.ggml, GGML[name]
    made = ggml.make(kind, layout, s.m, s.n, s.tokens, s.threads, s.memory)
    which = "cpu" if s.threads == 1 else "wall"

    def once() -> float:
        if s.clock is WALL:
            time.sleep(PAUSE)
        return float(ggml.run(made["job"], CALLS)[which][-1])

    facts = {"name": name, "threads": s.threads, "job": made["job"], "error": made["error"], "buffer": made["buffer"]}
    return Contender(facts, once, made["bytes"])


def drop_theirs(s: Setup, contenders: Sequence[Contender]) -> None:
    """Free what llama.cpp holds for them."""
    for each in contenders:
        if s.ggml is not None and "job" in each.facts:
            s.ggml.drop(each.facts["job"])


def _measured(s: Setup, make: Callable[[], list[Contender]], rounds: int, places: int = 1) -> dict[str, Any]:
    """Time what ``make`` makes, in as many fresh copies as ``places``: where memory lies is worth up to a half."""
    rows: list[dict[str, Any]] = []
    for _ in range(places):
        contenders = make()
        found = interleave(contenders, rounds // places, PATIENCE if s.tokens == 1 else math.inf)
        drop_theirs(s, contenders)
        for before, row in zip(rows, found, strict=bool(rows)):
            row["times"] = before["times"] + row["times"]
        rows = found
    return {"shape": [s.m, s.n], "tokens": s.tokens, "places": places, "rows": rows}


def gemv(s: Setup, rounds: int) -> dict[str, Any]:
    """One token, one thread, every format and every rival."""
    chosen = levels()
    packed = {name: random_packed(name, s.m, s.n) for name in FORMATS}

    def make() -> list[Contender]:
        contenders = [read(s), torch_linear(s), int4pack(s)]
        contenders += [theirs(s, name) for name in GGML] if s.ggml else []
        for name in FORMATS:
            contenders += ours(s, name, packed[name], chosen, [False] if name == DENSE else [False, True])
            if name == PLANES:
                contenders.append(direct(s, packed[name], chosen[0]))
        return contenders

    return _measured(s, make, rounds, PLACES)


def tokens(s: Setup, rounds: int) -> dict[str, Any]:
    """Several tokens, one thread, every format that is read for all of them at once or unpacked on the way."""
    packed = {name: random_packed(name, s.m, s.n) for name in (PLANES, "int4", PARTIAL, SPARSE, LOW_RANK)}

    def make() -> list[Contender]:
        contenders = [torch_linear(s), torch_linear(s, torch.float32), int4pack(s)]
        contenders += [theirs(s, Q4)] if s.ggml else []
        for name, each in packed.items():
            contenders += ours(s, name, each, levels(), [False, True] if name == PLANES else [False])
        return contenders

    return _measured(s, make, rounds)


def threads(s: Setup, rounds: int) -> dict[str, Any]:
    """One token, several threads, by the clock on the wall."""
    packed = {name: random_packed(name, s.m, s.n) for name in (PLANES, "int4", DENSE)}

    def make() -> list[Contender]:
        contenders = [read(s), torch_linear(s), int4pack(s)]
        contenders += [theirs(s, Q4)] if s.ggml else []
        for name, each in packed.items():
            contenders += ours(s, name, each, levels(), [False])
        return contenders

    return _measured(s, make, rounds, PLACES)


def loaded(one: Setup, two: Setup, load: int, rounds: int) -> dict[str, Any]:
    """One token on one thread and on two, both by the clock on the wall, while ``load`` other processes compute."""
    packed, level = random_packed(PLANES, one.m, one.n), levels()[:1]

    def make() -> list[Contender]:
        return [each for s in (one, two) for each in (torch_linear(s), *ours(s, PLANES, packed, level, [False]))]

    with busy(load):
        return {"load": load, **_measured(one, make, rounds)}


def layout(m: int, n: int, repeats: int) -> dict[str, Any]:
    """Processor seconds to lay a stored matrix out, by format; the least of some repeats."""
    torch.set_num_threads(1)
    rows = []
    for name in FORMATS:
        if name == DENSE:
            continue
        spec, parts = random_packed(name, m, n)
        seconds = []
        for _ in range(repeats):
            began = time.thread_time()
            made = make_product(parts, spec, levels()[0])
            seconds.append(time.thread_time() - began)
        stored = sum(part.nbytes for part in parts.values())
        rows.append({"name": name, "stored": stored, "bytes": made.nbytes, "seconds": min(seconds)})
    return {"shape": [m, n], "rows": rows}
