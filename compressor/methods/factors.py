"""Storing the two factors of a matrix of low rank: in half precision, or as integers fitted to each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.formats.dense import Dense
from compressor.formats.group_int import GroupInt
from compressor.formats.leaf import Leaf
from compressor.formats.low_rank import FACTOR_DTYPE, LowRank
from compressor.formats.parts import dtype_name
from compressor.formats.representation import Representation
from compressor.methods import gptq, round_nearest
from compressor.methods.quantize_settings import GptqSettings, RtnSettings
from compressor.methods.statistics import InputStatistics
from compressor.methods.subspace import Components
from compressor.methods.threads import one_thread

FACTOR_GROUP = 128

Weigh = Callable[[Tensor], Tensor]


def rounded_factors(
    left: Tensor, target: Tensor, stats: InputStatistics | None, *, bits: int, damp: float, weigh: Weigh | None = None
) -> LowRank:
    """Return a product near to ``target`` (m, n), both factors integers: ``left`` (m, r) rounded, the other by GPTQ.

    The right factor is fitted to what came of the left one.

    Args:
        stats: of the input; None for the plain squared error.
        damp: damping of the Hessian.
        weigh: see `best_right`.
    """
    stored = round_nearest.solve(left, None, RtnSettings(bits=bits, group="row")).code
    return _with_right(stored, target, stats, bits, damp, weigh)


def even_factors(
    parts: Components,
    rank: int,
    target: Tensor,
    stats: InputStatistics | None,
    *,
    bits: int,
    damp: float,
    weigh: Weigh | None = None,
) -> LowRank:
    """Return the first ``rank`` components of ``parts`` as they are stored, for a ``target`` (m, n) they were made of.

    For integers a component's size is shared between its factors such that rounding the left one costs every component
    the same: by the fourth root of its value, as in U sqrt(S) times sqrt(S) V^T. The left factor is rounded with errors
    weighted by what they do, the right one as in `rounded_factors`.
    """
    left, right = parts.left[:, :rank], parts.right[:rank]
    if bits == 16:
        return balanced(left, right)
    values = parts.values[:rank].float()
    size = values.clamp(min=1e-12 * float(values.max())) ** 0.25 if float(values.max()) > 0 else torch.ones_like(values)
    spread = InputStatistics(torch.diag(size.square()), rank)
    stored = gptq.solve(left * size, spread, GptqSettings(bits=bits, group=FACTOR_GROUP, damp=damp)).code
    return _with_right(stored, target, stats, bits, damp, weigh)


def _with_right(
    stored: Representation, target: Tensor, stats: InputStatistics | None, bits: int, damp: float, weigh: Weigh | None
) -> LowRank:
    right = best_right(stored.dense().to(target.device), target, weigh)
    fine = GptqSettings(bits=bits, group=FACTOR_GROUP, damp=damp)
    return LowRank(leaf(stored), leaf(gptq.solve(right, stats, fine).code))


def balanced(left: Tensor, right: Tensor) -> LowRank:
    """Return the product of ``left`` (m, r) and ``right`` (r, n), in fp16: a power of two makes them of like size."""
    sizes = [float(side.double().square().mean().sqrt()) for side in (left, right)]
    shift = 2.0 ** round(0.5 * math.log2(sizes[1] / sizes[0])) if min(sizes) > 0 else 1.0
    return LowRank(Dense((left * shift).to(FACTOR_DTYPE)), Dense((right / shift).to(FACTOR_DTYPE)))


def split_product(code: LowRank, rows: Sequence[int]) -> list[LowRank]:
    """Return products with the same right factor and so many rows each of the left one, which is dense or integers."""
    left = code.left
    if isinstance(left, Dense):
        return [LowRank(Dense(part), code.right) for part in torch.split(left.weight, list(rows))]
    assert isinstance(left, GroupInt)  # no other is made here
    zeros: Sequence[Tensor | None] = [None] * len(rows) if left.zero is None else torch.split(left.zero, list(rows))
    parts = zip(torch.split(left.codes, list(rows)), torch.split(left.scale, list(rows)), zeros, strict=True)
    return [LowRank(GroupInt(codes, scale, zero, left.bits), code.right) for codes, scale, zero in parts]


def best_right(left: Tensor, target: Tensor, weigh: Weigh | None = None) -> Tensor:
    """Return R (r, n) fp32 such that ``left`` (m, r) R is nearest to ``target`` (m, n), in whatever metric of inputs.

    Args:
        weigh: (m, r) fp64 -> F times it, where errors e of the outputs cost e^T F e; None: every one the same.
    """
    with one_thread():
        L, E = left.double(), target.double()
        weighted = L if weigh is None else weigh(L)
        right: Tensor = torch.linalg.pinv(L.T @ weighted, hermitian=True) @ (weighted.T @ E)
        return right.float()


def foresee_factors(
    shape: tuple[int, int], rank: int, bits: int, left_group: int | Literal["row"] = FACTOR_GROUP
) -> dict[str, Any]:
    """Return the specs of both factors, by side, of a matrix (m, n) = ``shape`` of that rank."""
    m, n = shape
    return {"left": _foresee(m, rank, left_group, bits), "right": _foresee(rank, n, FACTOR_GROUP, bits)}


def _foresee(rows: int, columns: int, group: int | Literal["row"], bits: int) -> dict[str, Any]:
    dtype = dtype_name(FACTOR_DTYPE)
    if bits == 16:
        return {"format": "dense", "shape": [rows, columns], "dtype": dtype}
    return round_nearest.foresee(RtnSettings(bits=bits, group=group), (rows, columns), dtype)


def leaf(code: Representation) -> Leaf:
    """The code, known to be one that a factor can have."""
    assert isinstance(code, Leaf)
    return code
