"""A matrix in the layout of the native kernels, and its product with activations."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

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

ALWAYS = 4
"""Up to so many tokens a kernel is the faster way for every kind and instruction set."""


def most_tokens(kind: Kind, level: str, dtype: torch.dtype, exact: bool) -> float:
    """Return up to how many tokens a kernel is faster than unpacking the matrix for PyTorch's product.

    Measured at 2048 x 2048, one thread: where the two take the same time, rounded down. Levels and 8-bit activations are
    the only pair that is faster for any number; everything else takes a token, or a few of them, after the other.
    """
    found = native()
    bf16 = level == "avx512" and found is not None and found.bf16
    if kind <= Kind.SIGN:
        return float("inf") if not exact else (32 if dtype is torch.bfloat16 else 16) if bf16 else ALWAYS
    if kind in (Kind.PARTIAL, Kind.SPARSE8):
        return (ALWAYS if bf16 else 8) if exact else 16 if level == "avx512" else ALWAYS
    return 8 if kind in (Kind.SPARSE_BF16, Kind.SPARSE_FP16) and bf16 else ALWAYS


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
        tokens = x.numel() // n
        if tokens > ALWAYS and tokens > most_tokens(self.kind, level, x.dtype, exact):
            weight = self.dense(x.dtype, level)
            return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        x = x.contiguous()
        out = torch.empty(*shape, self.m, dtype=x.dtype)
        if tokens:
            found = native()
            assert found is not None
            found.module.linear(
                *self.arguments(), x.data_ptr(), DTYPES[x.dtype], tokens, out.data_ptr(),
                0 if bias is None else bias.data_ptr(), int(exact), torch.get_num_threads(), LEVELS.index(level),
            )  # fmt: skip
        return out

    def dense(self, dtype: torch.dtype, level: str) -> Tensor:
        """Return the matrix (m, n), as the layout has it, rounded once to ``dtype``: fp32, bf16 or fp16."""
        if self.kind in (Kind.DENSE_BF16, Kind.DENSE_FP16):
            return self.data.to(dtype)
        found = native()
        assert found is not None
        out = torch.empty(self.m, self.n, dtype=dtype)
        how = (DTYPES[dtype], torch.get_num_threads(), LEVELS.index(level))
        found.module.unpack(*self.arguments(), out.data_ptr(), *how)
        return out

    def arguments(self) -> tuple[int | float, ...]:
        """Return how the kernels are told of a matrix."""
        extra = 0 if self.extra is None else self.extra.data_ptr()
        more = 0 if self.extra is None else self.extra.nbytes
        return self.kind, self.m, self.n, self.kb, self.factor, self.data.data_ptr(), self.data.nbytes, extra, more
