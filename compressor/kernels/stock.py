"""The rungs without kernels of our own: PyTorch's integer products, and plain matrices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compressor.formats.group_int import GroupInt
from compressor.formats.parts import Spec
from compressor.formats.representation import Representation, unpack
from compressor.formats.trit_planes import TritPlanes

GROUPS = (32, 64, 128, 256)
"""Inputs that may share a scale in ``torch._weight_int4pack_mm_for_cpu``."""

FEW = 4
"""Tokens up to which PyTorch's product is faster than that of plain matrices."""

FEW_IN_8_BITS = 2
"""Tokens up to which `Int8Chunks`, which takes one after the other, is faster than plain matrices."""

CHUNK = 512
"""Inputs of `Int8Chunks` that share a scale."""

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

    def read_nbytes(self, tokens: int) -> int:
        """Bytes that a product with so many tokens reads."""
        return self.weight.nbytes if tokens > FEW else self.nbytes - self.weight.nbytes


@dataclass(frozen=True, eq=False)
class Int8Chunks:
    """A matrix rounded to 8 bits, with a scale for every row and `CHUNK` inputs, multiplied by PyTorch's int8 product.

    Activations get 8 bits, too: a scale and a zero point for every token and chunk.

    Attributes:
        packed: of every chunk of inputs, what ``quantized::linear_prepack`` makes.
        weight: the matrix itself (m, n), for more tokens than :data:`FEW_IN_8_BITS`, and for graphs.
    """

    packed: list[Any]
    weight: Tensor

    def product(self, x: Tensor, bias: Tensor | None, level: str, exact: bool) -> Tensor:
        """Return ``x W^T + bias`` (tokens, m) in the dtype of ``x``."""
        if len(x) > FEW_IN_8_BITS or torch.compiler.is_compiling():
            return Dense(self.weight).product(x, bias, level, exact)
        wide = x.float()
        if not math.isfinite(float(wide.sum())):  # integers know no NaN
            return Dense(self.weight).product(x, bias, level, exact)
        y = self._of_one(wide) if len(x) == 1 else torch.cat([self._of_one(token) for token in torch.split(wide, 1)])
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    def _of_one(self, token: Tensor) -> Tensor:
        product = torch.ops.quantized.linear_dynamic
        first, *others = self.packed
        if not others:
            return product(token, first, False)  # type: ignore[no-any-return]
        part, *parts = torch.split(token, CHUNK, 1)
        total: Tensor = product(part, first, False)
        for packed, part in zip(others, parts, strict=True):
            total.add_(product(part, packed, False))
        return total

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.hidden_nbytes + self.weight.nbytes

    def read_nbytes(self, tokens: int) -> int:
        """Bytes that a product with so many tokens reads; once, though it takes one after the other."""
        return self.weight.nbytes if tokens > FEW_IN_8_BITS else self.hidden_nbytes

    @property
    def hidden_nbytes(self) -> int:
        """Those that are in no tensor: codes and scales."""
        return self.weight.numel() + 4 * len(self.packed) * len(self.weight)


def has_int8() -> bool:
    """Return whether PyTorch has that product, and this processor what makes it fast and keeps it from overflowing."""
    product = hasattr(torch.ops.quantized, "linear_dynamic") and hasattr(torch, "_make_per_channel_quantized_tensor")
    vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    return product and vnni and torch.backends.quantized.engine in ("x86", "fbgemm")


def _in_8_bits(weight: Tensor) -> list[Any]:
    """Pack a matrix (m, n) for `Int8Chunks`."""
    packed, zero = [], torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # quantized tensors are to leave PyTorch; see `has_int8`
        for part in torch.split(weight.float(), CHUNK, 1):
            largest = part.abs().amax(1, keepdim=True)
            scale = torch.where(largest > 0, largest / 127, 1.0)
            codes = (part / scale).round().to(torch.int8)
            tensor = torch._make_per_channel_quantized_tensor(codes, scale[:, 0].double(), zero, 0)
            packed.append(torch.ops.quantized.linear_prepack(tensor, None))
    return packed


def _packed(codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pack codes (m, n) int8 from -8 to 7 with scales and zero points (m, G): value = (code - zero) scale."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).to(torch.int32), INNER)
    middle = torch.zeros_like(scale) if zero is None else -zero.float() * scale
    return packed, torch.stack([scale, middle], -1).transpose(0, 1).contiguous().to(torch.bfloat16)


def make_stock(parts: Mapping[str, Tensor], spec: Spec, dtype: torch.dtype) -> Int4Pack | Int8Chunks | None:
    """Return the matrix for one of PyTorch's integer products; None where they would be no faster, or lose too much.

    What one 4-bit product can hold, integers of up to 4 bits and one plane of trits, is multiplied as it is; other
    integers and trits are rounded to 8 bits where PyTorch multiplies these fast, and two planes of trits are two 4-bit
    products where not. ``dtype`` is that of the model.
    """
    if spec["format"] not in ("trit-planes", "group-int"):
        return None  # large weights among small ones: a scale of 8 bits for both would lose the small ones
    found = unpack(spec, parts)
    terms = _terms(found, spec)
    if len(terms) != 1 and has_int8():
        weight = found.dense(dtype)
        return Int8Chunks(_in_8_bits(weight), weight)
    if not terms:
        return None
    packed, scales = zip(*(_packed(*term) for term in terms), strict=True)
    return Int4Pack(list(packed), list(scales), spec["group"], found.dense(dtype))


def _terms(found: Representation, spec: Spec) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Codes, scales and zero points of the 4-bit products to be summed up; none where they cannot hold the matrix."""
    (m, n), group = spec["shape"], spec.get("group")
    if group not in GROUPS or n % group or m % MULTIPLE:
        return []
    if isinstance(found, TritPlanes) and len(found.trits) <= 2:
        return [(trits, scale.float(), None) for trits, scale in zip(found.trits, found.scale, strict=True)]
    if isinstance(found, GroupInt) and found.bits <= 4:
        return [(found.codes, found.scale, found.zero)]
    return []
