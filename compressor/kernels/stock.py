"""The rungs without kernels of our own: PyTorch's integer product, and plain matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compressor.formats.group_int import GroupInt
from compressor.formats.parts import Spec
from compressor.formats.representation import unpack
from compressor.formats.trit_planes import TritPlanes

GROUPS = (32, 64, 128, 256)
"""Inputs that may share a scale in ``torch._weight_int4pack_mm_for_cpu``."""

FEW = 4
"""Tokens up to which PyTorch's product is faster than that of plain matrices."""

INNER = 2
MULTIPLE = 16
"""Of which the number of outputs must be."""


@dataclass(frozen=True, eq=False)
class Dense:
    """A plain matrix (m, n), multiplied in its own dtype."""

    weight: Tensor

    def product(self, x: Tensor, bias: Tensor | None, level: str, exact: bool) -> Tensor:
        """Return ``x W^T + bias`` (tokens, m) in the dtype of ``x``."""
        weight = self.weight.to(x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.weight.numel() * self.weight.element_size()


@dataclass(frozen=True, eq=False)
class Int4Pack:
    """A sum of matrices of 4-bit codes, multiplied by PyTorch with activations in bf16.

    Attributes:
        packed: of every term, what ``_convert_weight_to_int4pack_for_cpu`` makes.
        scales: of every term bf16 (n / group, m, 2): scale, and the value of code 8.
        group: inputs that share a scale.
        weight: the matrix itself (m, n), for more tokens than :data:`FEW`: PyTorch's product is the slower one then.
    """

    packed: list[Tensor]
    scales: list[Tensor]
    group: int
    weight: Tensor

    def product(self, x: Tensor, bias: Tensor | None, level: str, exact: bool) -> Tensor:
        """Return ``x W^T + bias`` (tokens, m) in the dtype of ``x``, with activations and scales rounded to bf16."""
        if len(x) > FEW:
            return Dense(self.weight).product(x, bias, level, exact)
        narrow = x.to(torch.bfloat16).contiguous()
        total: Tensor | None = None
        for packed, scale in zip(self.packed, self.scales, strict=True):
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(narrow, packed, self.group, scale)
            total = y.float() if total is None else total.add_(y)
        assert total is not None
        return (total if bias is None else total.add_(bias)).to(x.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(part.nbytes for part in (*self.packed, *self.scales, self.weight))


def _term(codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pack codes (m, n) int8 from -8 to 7 with scales and zero points (m, G): value = (code - zero) scale."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).to(torch.int32), INNER)
    middle = torch.zeros_like(scale) if zero is None else -zero.float() * scale
    return packed, torch.stack([scale, middle], -1).transpose(0, 1).contiguous().to(torch.bfloat16)


def make_stock(parts: Mapping[str, Tensor], spec: Spec, dtype: torch.dtype) -> Int4Pack | None:
    """Return the matrix for PyTorch's 4-bit product; None where that cannot hold it, or would be no faster.

    Trit planes become a term each, up to two, integers of up to 4 bits one. ``dtype`` is that of the model.
    """
    if spec["format"] not in ("trit-planes", "group-int"):
        return None
    m, n = spec["shape"]
    if spec["group"] not in GROUPS or n % spec["group"] or m % MULTIPLE:
        return None
    found = unpack(spec, parts)
    if isinstance(found, TritPlanes) and len(found.trits) <= 2:
        terms = [_term(trits, scale.float(), None) for trits, scale in zip(found.trits, found.scale, strict=True)]
    elif isinstance(found, GroupInt) and found.bits <= 4:
        terms = [_term(found.codes, found.scale, found.zero)]
    else:
        return None
    return Int4Pack([packed for packed, _ in terms], [scale for _, scale in terms], spec["group"], found.dense(dtype))
