"""Matrices in every layout beside what they stand for in fp64, and activations rounded as the kernels say they do."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.kernels.matrix import Kind, Matrix, aligned
from compressor.kernels.records import WIDEST_SUM, int_records, joint_numbers, sign_records, trit_records
from compressor.kernels.streams import partial_stream, sparse_codes_stream, sparse_stream

HERE = ("portable", "neon") if platform.machine() in ("arm64", "aarch64") else ("portable", "avx2", "avx512")
"""Instruction sets of processors like this one."""


@dataclass(frozen=True)
class Case:
    """A matrix in a layout.

    Attributes:
        matrix: the layout.
        weights: (m, n) fp64, what it may stand for: as stored, and for trits also with the planes joined into levels of
            8 bits.
        dense: (m, n) fp64 as stored, for a comparison with what is unpacked.
    """

    matrix: Matrix
    weights: list[Tensor]

    @property
    def dense(self) -> Tensor:
        return self.weights[0]


def numbers(seed: int, m: int, n: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + m * 1009 + n)


def spread(values: Tensor, group: int, n: int) -> Tensor:
    """(..., G) -> (..., n) fp64."""
    return values.double().repeat_interleave(min(group, n), -1)[..., :n]


def groups_of(n: int, group: int) -> int:
    return 1 if group >= n else -(-n // group)


def trits(planes: int) -> Callable[..., Case]:
    def make(m: int, n: int, group: int, level: str) -> Case:
        g = numbers(planes, m, n)
        entries = torch.randint(-1, 2, (planes, m, n), generator=g).to(torch.int8)
        scale = torch.rand(planes, m, groups_of(n, group), generator=g).mul(0.05).sort(0, descending=True)[0].half()
        dense = (entries.double() * spread(scale, group, n)).sum(0)
        weights = [dense]
        if planes > 1:
            wide = scale.float()
            number = joint_numbers(wide, WIDEST_SUM.get(level, 125)).float()
            largest = wide.amax(0).clamp_min(1e-30)
            whole = torch.floor(wide * (number / largest) + 0.5)
            weights.append(((entries.double() * spread(whole, group, n)).sum(0)) * spread(largest / number, group, n))
        return Case(trit_records(entries, scale, group, level), weights)

    return make


def ints(bits: int, zeros: bool) -> Callable[..., Case]:
    def make(m: int, n: int, group: int, level: str) -> Case:
        g, most = numbers(10 * bits + zeros, m, n), 1 << (bits - 1)
        codes = torch.randint(-most, most, (m, n), generator=g).to(torch.int8)
        scale = torch.rand(m, groups_of(n, group), generator=g).mul(0.1 / most).half().float()
        zero = torch.randint(-most, most, scale.shape, generator=g).to(torch.int8) if zeros else None
        shift = 0 if zero is None else spread(zero, group, n)
        return Case(int_records(codes, scale, zero, bits, group), [(codes.double() - shift) * spread(scale, group, n)])

    return make


def signs(means: bool) -> Callable[..., Case]:
    def make(m: int, n: int, group: int, level: str) -> Case:
        g = numbers(2 + means, m, n)
        plus = torch.rand(m, n, generator=g) < 0.5
        scale = torch.rand(m, groups_of(n, group), generator=g).mul(0.05).half()
        mean = torch.randn(scale.shape, generator=g).mul(0.02).half() if means else None
        dense = (plus.double() * 2 - 1) * spread(scale, group, n)
        if mean is not None:
            dense = dense + spread(mean, group, n)
        return Case(sign_records(plus, scale, mean, group), [dense])

    return make


def partial(share: float, means: bool, uneven: bool = False) -> Callable[..., Case]:
    """With ``uneven``, from none of a row to all of another is marked."""

    def make(m: int, n: int, group: int, level: str) -> Case:
        group = group if group % 128 == 0 else n
        g = numbers(int(100 * share), m, n)
        plus, salient = torch.rand(m, n, generator=g) < 0.5, torch.rand(m, n, generator=g) < share
        if uneven:
            salient = torch.rand(m, n, generator=g) < torch.rand(m, 1, generator=g) * 1.4 - 0.2
        scale = torch.rand(m, groups_of(n, group), generator=g).mul(0.05).half()
        mean = torch.randn(scale.shape, generator=g).mul(0.02).half() if means else None
        codes = torch.randint(0, 256, (m, n), generator=g).to(torch.uint8)
        step, zero = torch.rand(m, generator=g).mul(0.001), torch.randint(0, 256, (m,), generator=g).float()
        binary = (plus.double() * 2 - 1) * spread(scale, group, n) + (0 if mean is None else spread(mean, group, n))
        grid = (codes.double() - zero.double()[:, None]) * step.double()[:, None]
        matrix = partial_stream(plus & ~salient, scale, mean, group, salient, codes, step, zero)
        return Case(matrix, [torch.where(salient, grid, binary)])

    return make


def sparse_codes(m: int, n: int, group: int, level: str) -> Case:
    g = numbers(7, m, n)
    mask, codes = torch.rand(m, n, generator=g) < 0.5, torch.randint(0, 256, (m, n), generator=g).to(torch.uint8)
    step, zero = torch.rand(m, generator=g).mul(0.001), torch.randint(0, 256, (m,), generator=g).float()
    grid = (codes.double() - zero.double()[:, None]) * step.double()[:, None]
    return Case(sparse_codes_stream(codes, mask, step, zero), [grid * mask])


def sparse(dtype: torch.dtype, share: float = 0.5) -> Callable[..., Case]:
    def make(m: int, n: int, group: int, level: str) -> Case:
        g = numbers(8, m, n)
        weight, mask = torch.randn(m, n, generator=g).mul(0.05).to(dtype), torch.rand(m, n, generator=g) < share
        return Case(sparse_stream(weight, mask), [weight.double() * mask])

    return make


def plain(kind: Kind, dtype: torch.dtype) -> Callable[..., Case]:
    def make(m: int, n: int, group: int, level: str) -> Case:
        weight = torch.randn(m, n, generator=numbers(9, m, n)).mul(0.05).to(dtype)
        return Case(Matrix(kind, m, n, 128, 1.0, weight), [weight.double()])

    return make


CASES: dict[str, Callable[..., Case]] = {
    **{f"trit{planes}": trits(planes) for planes in (1, 2, 3)},
    **{f"int{bits}": ints(bits, False) for bits in (2, 3, 4, 8)},
    **{f"int{bits}-zeros": ints(bits, True) for bits in (2, 3, 4, 5, 8)},
    "sign": signs(False),
    "sign-means": signs(True),
    "partial": partial(0.1, False),
    "partial-means": partial(0.1, True),
    "partial-all": partial(1.1, True),
    "partial-none": partial(-1.0, False),
    "partial-uneven": partial(0.5, True, uneven=True),
    "sparse8": sparse_codes,
    "sparse-bf16": sparse(torch.bfloat16),
    "sparse-fp16": sparse(torch.float16),
    "sparse-bf16-full": sparse(torch.bfloat16, 1.1),
    "sparse-fp16-empty": sparse(torch.float16, -1.0),
    "dense-bf16": plain(Kind.DENSE_BF16, torch.bfloat16),
    "dense-fp16": plain(Kind.DENSE_FP16, torch.float16),
}


def whole_numbers(m: int, n: int, level: str) -> list[Case]:
    """Matrices whose products with whole numbers up to 127 are multiples of 1/64 that fp32 has, for n up to 256."""
    g = numbers(11, m, n)
    scale = torch.ones(m, groups_of(n, 64), dtype=torch.float16)
    out = []
    for planes in (1, 2, 3):
        entries = torch.randint(-1, 2, (planes, m, n), generator=g).to(torch.int8)
        share = torch.tensor([1, 0.5, 0.25])[:planes, None, None]
        made = trit_records(entries, scale * share.half(), 64, level)
        if made.extra is not None:  # planes joined without a rest
            made = replace(made, extra=torch.full_like(made.extra, 32 if level in WIDEST_SUM else 64))
        out.append(Case(made, [(entries.double() * share.double()).sum(0)]))
    for bits in (2, 3, 4, 8):
        most = 1 << (bits - 1)
        codes = torch.randint(-most, most, (m, n), generator=g).to(torch.int8)
        zero = torch.randint(-most, most, scale.shape, generator=g).to(torch.int8)
        made = int_records(codes, scale.float(), zero, bits, 64)
        out.append(Case(made, [codes.double() - spread(zero, 64, n)]))
    plus, marked = torch.rand(m, n, generator=g) < 0.5, torch.rand(m, n, generator=g) < 0.2
    binary = plus.double() * 2 - 1 + 0.25
    out.append(Case(sign_records(plus, scale, scale * 0.25, 64), [binary]))
    codes = torch.randint(0, 256, (m, n), generator=g).to(torch.uint8)
    step, zero = torch.full((m,), 0.25), torch.randint(0, 256, (m,), generator=g).float()
    grid = (codes.double() - zero.double()[:, None]) * 0.25
    one = scale[:, :1]
    made = partial_stream(plus & ~marked, one, one * 0.25, n, marked, codes, step, zero)
    out.append(Case(made, [torch.where(marked, grid, binary)]))
    out.append(Case(sparse_codes_stream(codes, marked, step, zero), [grid * marked]))
    weight = torch.randint(-127, 128, (m, n), generator=g)
    for dtype, kind in ((torch.bfloat16, Kind.DENSE_BF16), (torch.float16, Kind.DENSE_FP16)):
        out.append(Case(sparse_stream(weight.to(dtype), marked), [weight.double() * marked]))
        out.append(Case(Matrix(kind, m, n, 128, 1.0, aligned(weight.to(dtype))), [weight.double()]))
    return out


def quantized(x: Tensor, kb: int) -> tuple[Tensor, Tensor]:
    """(tokens, n) -> whole numbers (tokens, groups, kb), their scales (tokens, groups, 1); see native/quantize.hpp."""
    tokens, n = x.shape
    wide = torch.nn.functional.pad(x.float(), (0, -n % kb)).view(tokens, -1, kb)
    largest = wide.abs().amax(-1, keepdim=True)
    zero = largest < 1e-30
    inverse = torch.div(torch.full_like(largest, 127.0), torch.where(zero, 1, largest))  # 127 / x would not divide
    q = torch.round(wide * inverse).masked_fill(zero, 0)
    return q, torch.div(largest, torch.full_like(largest, 127.0)).masked_fill(zero, 0)


def rounded(x: Tensor, kb: int) -> Tensor:
    """(tokens, n) -> fp64: every ``kb`` inputs of a token rounded to 8 bits."""
    q, scale = quantized(x, kb)
    return (q.double() * scale.double()).view(len(x), -1)[:, : x.shape[1]]


def inputs(case: Case, x: Tensor, exact: bool) -> list[Tensor]:
    """What (tokens, n) may be multiplied as: as it is; or rounded to 8 bits; or, beside 16-bit numbers, to bf16."""
    if exact:
        return [x.double()]
    if case.matrix.kind >= Kind.SPARSE_BF16:
        return [x.double(), x.bfloat16().double()]
    return [rounded(x, case.matrix.kb)]


EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def excess(case: Case, x: Tensor, y: Tensor, bias: Tensor | None, exact: bool) -> float:
    """By what factor the worst entry of ``y`` is farther from the fp64 product than rounding explains; 1 is the limit.

    Sums of n fp32 numbers may be off by a few 1e-7 of the sum of magnitudes; what is stored, by half a unit.
    """
    best = float("inf")
    for weight in case.weights if not exact else case.weights[:1]:
        for seen in inputs(case, x, exact):
            want = seen @ weight.T
            size = seen.abs() @ weight.abs().T
            if bias is not None:
                want, size = want + bias.double(), size + bias.double().abs()
            room = 3e-6 * size + EPS[y.dtype] * want.abs() + 1e-7
            best = min(best, float(((y.double() - want).abs() / room).max()))
    return best
