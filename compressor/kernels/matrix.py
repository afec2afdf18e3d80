"""A matrix in the layout of the native kernels, and its product with activations."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compressor.kernels.native import LEVELS, native

ALIGNMENT = 64


class Kind(IntEnum):
    """Layouts, by the numbers of native/layout.hpp."""

    TRIT1 = 1
    TRIT2 = 2
    TRIT3 = 3
    INT2 = 4
    INT3 = 5
    INT4 = 6
    INT8 = 7
    SIGN = 8
    PARTIAL = 9
    SPARSE8 = 10
    SPARSE_BF16 = 11
    SPARSE_FP16 = 12
    DENSE_BF16 = 13
    DENSE_FP16 = 14


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of activations, by the numbers that the kernels know them by."""

FEW = 3
"""Up to so many tokens every kind is multiplied as one token is: what is rounded for one is rounded for these."""


class Way(IntEnum):
    """What the kernels multiply, by their numbers for it."""

    ROUNDED = 0
    """Activations in 8 bits."""
    EXACT = 1
    """Activations as they are."""
    UNPACKED = 2
    """Activations as they are, 16 unpacked rows at a time; in bf16 where the processor multiplies activations so."""


def multiplies_bf16(level: str, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Return whether an instruction set has products of bf16 on this processor, and activations are in it."""
    found = native()
    return level == "avx512" and dtype is torch.bfloat16 and found is not None and found.bf16


def packed_tokens(kind: Kind, level: str, dtype: torch.dtype, exact: bool) -> float:
    """Return up to how many tokens multiplying by the packed matrix is faster than unpacking it.

    This and `panel_tokens` were measured at 2048 x 2048 on one thread: where both take the same time, rounded down.
    With activations of 8 bits, levels are faster for any number of tokens; everything else takes one token, or a few,
    after the other.
    """
    bf16, wide = multiplies_bf16(level, dtype), level == "avx512"
    if kind <= Kind.SIGN:
        return math.inf if not exact else 24 if bf16 else 8 if multiplies_bf16(level) else 4
    if kind == Kind.PARTIAL:
        return (FEW if multiplies_bf16(level) else 1) if exact else 16 if bf16 else 128 if wide else 24
    if kind == Kind.SPARSE8:
        return 1 if exact else FEW if bf16 else 16 if wide else 4
    if kind in (Kind.SPARSE_BF16, Kind.SPARSE_FP16):
        return 2 if bf16 or (wide and exact) else 6 if wide else 3
    return 1 if bf16 else 8


def panel_tokens(kind: Kind, level: str, dtype: torch.dtype) -> float:
    """Return up to how many tokens `Way.UNPACKED` is faster than unpacking the matrix for PyTorch's product."""
    if dtype is torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return math.inf  # PyTorch is slow then
    if kind >= Kind.DENSE_BF16 and not multiplies_bf16(level, dtype):
        return 0
    return 128 if level == "avx512" else 48


def room(nbytes: int) -> Tensor:
    """Return memory for a layout, uint8 (nbytes,), in large pages where the system has any."""
    found = native()
    assert found is not None
    data = torch.empty(nbytes, dtype=torch.uint8)
    found.module.use_large_pages(data.data_ptr(), nbytes)
    return data


def aligned(weight: Tensor) -> Tensor:
    """Return a plain matrix as the kernels read it: contiguous, at an address that is a multiple of 64.

    Tensors that are mapped from a file lie anywhere; they are copied.
    """
    weight = weight.contiguous()
    return weight.clone() if weight.data_ptr() % ALIGNMENT else weight


@dataclass(frozen=True, eq=False)
class Matrix:
    """``m`` x ``n`` numbers in a layout.

    Attributes:
        kind: of layout.
        m, n: outputs and inputs.
        kb: inputs of a record.
        factor: fp32 number that everything is times.
        data: the layout, see native/layout.hpp; uint8, or the 16-bit matrix itself for the dense kinds.
        extra: int64 (tiles + 1,) offsets in ``data`` for layouts of variable length; for two and three planes of trits
            uint8 (tiles, records, 16), see `records.joint_numbers`.
    """

    kind: Kind
    m: int
    n: int
    kb: int
    factor: float
    data: Tensor
    extra: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(part.numel() * part.element_size() for part in (self.data, self.extra) if part is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has memory of its own, and must not keep `arguments`."""
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    def product(self, x: Tensor, bias: Tensor | None, level: str, exact: bool) -> Tensor:
        """Return ``x W^T + bias``.

        Args:
            x: (tokens, n) fp32, bf16 or fp16, on the CPU.
            bias: (m,) fp32, or None.
            level: instruction set.
            exact: whether activations stay as they are; else they are rounded to 8 bits with a scale for every token
                and record, or to bf16 where the matrix is of 16-bit numbers.

        Returns:
            (tokens, m) in the dtype of ``x``.
        """
        if torch.compiler.is_compiling():
            from compressor.kernels.ops import traced_product

            return traced_product(self, x, bias, level, exact)
        return self.eager_product(x, bias, level, exact)

    def eager_product(self, x: Tensor, bias: Tensor | None, level: str, exact: bool) -> Tensor:
        """As `product`, outside of graphs, and of (..., n) to (..., m), which saves a view and another.

        Raises:
            ValueError: another number of inputs.
        """
        *shape, n = x.shape
        if n != self.n:
            raise ValueError(f"a matrix of {self.m} x {self.n} cannot multiply inputs of {tuple(x.shape)}")
        tokens, way = x.numel() // n, Way.EXACT if exact else Way.ROUNDED
        if tokens > 1 and tokens > packed_tokens(self.kind, level, x.dtype, exact):
            if tokens > panel_tokens(self.kind, level, x.dtype):
                weight = self.dense(x.dtype, level)
                return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
            way = Way.UNPACKED
        out = torch.empty(*shape, self.m, dtype=x.dtype)
        if tokens:
            self.multiply(x.contiguous(), bias, out, level, way)
        return out

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor, level: str, way: Way) -> None:
        """Write ``x W^T + bias`` to ``out``: (tokens, n) and (tokens, m) of one dtype, contiguous, one token at least.

        Raises:
            ValueError: arguments do not fit.
        """
        found = native()
        assert found is not None
        found.module.linear(
            *self.arguments, x.data_ptr(), DTYPES[x.dtype], x.numel() // self.n, out.data_ptr(),
            0 if bias is None else bias.data_ptr(), way, torch.get_num_threads(), LEVELS.index(level),
        )  # fmt: skip

    def dense(self, dtype: torch.dtype, level: str) -> Tensor:
        """Return the matrix (m, n), as the layout has it, rounded once to ``dtype``: fp32, bf16 or fp16."""
        if self.kind in (Kind.DENSE_BF16, Kind.DENSE_FP16):
            return self.data.to(dtype)
        found = native()
        assert found is not None
        out = room(self.m * self.n * dtype.itemsize).view(dtype).view(self.m, self.n)
        how = (DTYPES[dtype], torch.get_num_threads(), LEVELS.index(level))
        found.module.unpack(*self.arguments, out.data_ptr(), *how)
        return out

    @cached_property  # finding it out takes as long as 2 % of a product of 2048 x 2048
    def arguments(self) -> tuple[int | float, ...]:
        """How the kernels are told of a matrix."""
        extra = 0 if self.extra is None else self.extra.data_ptr()
        more = 0 if self.extra is None else self.extra.nbytes
        return self.kind, self.m, self.n, self.kb, self.factor, self.data.data_ptr(), self.data.nbytes, extra, more
