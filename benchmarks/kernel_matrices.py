"""Random matrices in every format, and products with them whose weights are never in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import cycle
from typing import Any, TypeVar

import torch
from torch import Tensor

from compressor.formats.dense import Dense
from compressor.formats.group_int import GroupInt, portable_scale
from compressor.formats.low_rank import LowRank
from compressor.formats.partial_binary import PartialBinary
from compressor.formats.parts import Spec
from compressor.formats.representation import Masked, Representation, pack
from compressor.formats.trit_planes import TritPlanes
from compressor.kernels.matrix import room

GROUP = 128
Packed = tuple[Spec, dict[str, Tensor]]


def _trits(planes: int) -> Callable[[int, int], Representation]:
    def make(m: int, n: int) -> TritPlanes:
        trits = torch.randint(-1, 2, (planes, m, n), dtype=torch.int8)
        scale = (torch.rand(planes, m, -(-n // GROUP)) * 0.01 + 0.001).sort(0, descending=True)[0]
        return TritPlanes(trits, scale.half(), GROUP)

    return make


def _ints(bits: int) -> Callable[[int, int], Representation]:
    def make(m: int, n: int) -> GroupInt:
        half = 1 << (bits - 1)
        codes = torch.randint(-half, half, (m, n), dtype=torch.int8)
        zero = torch.randint(-half, half, (m, n // GROUP), dtype=torch.int8)
        return GroupInt(codes, portable_scale(torch.rand(m, n // GROUP) * 0.01 + 0.001, bits), zero, bits)

    return make


def _partial(m: int, n: int) -> PartialBinary:
    salient = torch.rand(m, n) < 0.1
    signs = (torch.rand(m, n) < 0.5) & ~salient
    scale = (torch.rand(m, n // GROUP) * 0.01 + 0.001).half()
    codes = torch.randint(0, 256, (m, n), dtype=torch.uint8).masked_fill_(~salient, 0)
    step, zero = torch.full((m, 1), 0.001).half(), torch.full((m,), 128, dtype=torch.uint8)
    return PartialBinary(signs, scale, scale / 10, salient, codes, step, zero, 8, GROUP)


def _sparse(m: int, n: int) -> Masked:
    return Masked(torch.randn(m, n).bfloat16(), torch.rand(m, n) < 0.5)


def _dense(m: int, n: int) -> Dense:
    return Dense(torch.randn(m, n).bfloat16())


def _low_rank(m: int, n: int) -> LowRank:
    rank = m * n // (4 * (m + n)) // 16 * 16
    return LowRank(_dense(m, rank), _dense(rank, n))


DENSE, PLANES = "dense bf16", "2 trit planes"
PARTIAL, SPARSE = "partial binary, 10 % of 8 bits", "50 % sparse bf16"
LOW_RANK = "low rank, 25 % of the parameters"
FORMATS: dict[str, Callable[[int, int], Representation]] = {
    PLANES: _trits(2),
    "1 trit plane": _trits(1),
    "3 trit planes": _trits(3),
    "int4": _ints(4),
    "int3": _ints(3),
    "int8": _ints(8),
    PARTIAL: _partial,
    SPARSE: _sparse,
    LOW_RANK: _low_rank,
    DENSE: _dense,
}
"""Name -> (outputs, inputs) -> a random matrix. Groups are of 128 inputs."""


def random_packed(name: str, m: int, n: int) -> Packed:
    """A random matrix of a format, as it is stored."""
    torch.manual_seed(0)
    return pack(FORMATS[name](m, n), torch.bfloat16)


T = TypeVar("T")


def cloned(value: T) -> T:
    """A copy of a tensor, or of a dataclass of tensors, in memory of its own: in large pages, as layouts lie."""
    found: Any = value
    if isinstance(found, Tensor):
        found = room(found.nbytes).view(found.dtype).view(found.shape).copy_(found)
    elif is_dataclass(value) and not isinstance(value, type):
        found = replace(value, **{each.name: cloned(getattr(value, each.name)) for each in fields(value)})
    return found  # type: ignore[no-any-return]


def rotation(value: T, nbytes: int, memory: int) -> Iterator[T]:
    """Copies of something of ``nbytes``, one after the other and from the start again, ``memory`` bytes in all."""
    return cycle([cloned(value) for _ in range(max(2, -(-memory // nbytes)))])
