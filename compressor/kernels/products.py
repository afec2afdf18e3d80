"""From a packed matrix of any format to something that multiplies fast with it, or the reason why nothing does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from compressor.formats.dense import Dense
from compressor.formats.group_int import GroupInt
from compressor.formats.low_rank import LowRank
from compressor.formats.partial_binary import PartialBinary
from compressor.formats.parts import Spec
from compressor.formats.representation import Masked, Representation, SparseInt, unpack
from compressor.formats.scaled_binary import ScaledBinary
from compressor.formats.sum import Sum
from compressor.formats.trit_planes import TritPlanes
from compressor.kernels.matrix import Kind, Matrix, aligned
from compressor.kernels.records import int_records, record_inputs, sign_records, trit_records
from compressor.kernels.streams import SPARSE_16, partial_stream, sparse_codes_stream, sparse_stream


class Unsupported(Exception):  # noqa: N818  # a reason, not an error
    """Why there is no fast way for a matrix."""


@dataclass(frozen=True, eq=False)
class Chain:
    """``left right``: one product after the other."""

    right: Product
    left: Product

    def product(self, x: Tensor, bias: Tensor | None, level: str, exact: bool) -> Tensor:
        """Return ``x (left right)^T + bias``; see `Matrix.product`."""
        return self.left.product(self.right.product(x, None, level, exact), bias, level, exact)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.right.nbytes + self.left.nbytes


@dataclass(frozen=True, eq=False)
class Added:
    """``base + more``."""

    base: Product
    more: Product

    def product(self, x: Tensor, bias: Tensor | None, level: str, exact: bool) -> Tensor:
        """Return ``x (base + more)^T + bias``; see `Matrix.product`."""
        return self.base.product(x, bias, level, exact).add_(self.more.product(x, None, level, exact))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.base.nbytes + self.more.nbytes


@dataclass(frozen=True, eq=False)
class Scaled:
    """A matrix whose inputs are first chosen, then scaled: W[:, index] = matrix * scale.

    Attributes:
        scale: fp32 (inputs of ``matrix``,).
        index: int64, the inputs of ``matrix``, or None: all.
    """

    matrix: Product
    scale: Tensor
    index: Tensor | None

    def product(self, x: Tensor, bias: Tensor | None, level: str, exact: bool) -> Tensor:
        """Return the product; see `Matrix.product`."""
        chosen = x if self.index is None else x.index_select(1, self.index)
        return self.matrix.product((chosen * self.scale).to(x.dtype), bias, level, exact)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        index = 0 if self.index is None else self.index.nbytes
        return self.matrix.nbytes + self.scale.nbytes + index


Product: TypeAlias = "Matrix | Chain | Added | Scaled"


def make_product(parts: Mapping[str, Tensor], spec: Spec, level: str) -> Product:
    """Lay a packed matrix out for the native kernels.

    Args:
        parts, spec: what was stored, on the CPU.
        level: instruction set for which it is made.

    Raises:
        Unsupported: says why.
    """
    return _product(unpack(spec, parts), level)


def _records_of(group: int, n: int) -> int:
    size = record_inputs(group, n)
    if size is None:
        raise Unsupported(f"groups of {group} inputs: expected a multiple of 32, or all {n}")
    return size


def _product(r: Representation, level: str) -> Product:
    if isinstance(r, TritPlanes):
        _records_of(r.group, r.trits.shape[2])
        if bool((r.scale < 0).any()):
            raise Unsupported("negative scales of trits")
        return trit_records(r.trits, r.scale, r.group, level)
    if isinstance(r, GroupInt):
        return _ints(r)
    if isinstance(r, SparseInt):
        return sparse_codes_stream(r.codes, r.mask, r.scale, r.zero)
    if isinstance(r, PartialBinary):
        return _partial(r)
    if isinstance(r, ScaledBinary):
        return _scaled_binary(r)
    if isinstance(r, LowRank):
        return Chain(_product(r.right, level), _product(r.left, level))
    if isinstance(r, Sum):
        return Added(_product(r.base, level), _product(r.correction, level))
    if isinstance(r, Masked):
        if r.weight.dtype not in SPARSE_16:
            raise Unsupported(f"a sparse matrix of {r.weight.dtype}: expected bf16 or fp16")
        return sparse_stream(r.weight, r.mask)
    return _dense(r)


def _dense(r: Dense) -> Matrix:
    kinds = {torch.bfloat16: Kind.DENSE_BF16, torch.float16: Kind.DENSE_FP16}
    if r.weight.dtype not in kinds:
        raise Unsupported(f"a dense matrix of {r.weight.dtype}: expected bf16 or fp16")
    m, n = r.weight.shape
    return Matrix(kinds[r.weight.dtype], m, n, 128, 1.0, aligned(r.weight))


def _ints(r: GroupInt) -> Matrix:
    n = r.codes.shape[1]
    group = n // r.scale.shape[1]
    _records_of(group, n)
    if not torch.equal(r.scale.half().float(), r.scale):
        raise Unsupported("scales of integers that fp16 cannot represent")
    return int_records(r.codes, r.scale, r.zero, r.bits, group)


def _partial(r: PartialBinary) -> Product:
    m, n = r.signs.shape
    zero = torch.full((m,), float(1 << (r.bits - 1))) if r.zero is None else r.zero.float()
    if r.by_input:  # whole inputs: a thin matrix of integers beside signs that see zeros in their place
        marked = r.salient[0]
        _records_of(r.group, n)
        signs: Product = sign_records(r.signs, r.scale, r.mean, r.group)
        if not bool(marked.any()):
            return signs
        signs = Scaled(signs, (~marked).float(), None)
        codes = _bytes(r.codes[:, marked], torch.ones(m), zero)
        return Added(signs, Scaled(codes, r.step[0, marked].float(), marked.nonzero()[:, 0]))
    if r.group < n and r.group % 128:
        raise Unsupported(f"groups of {r.group} inputs beside single integers: expected a multiple of 128, or all {n}")
    return partial_stream(r.signs, r.scale, r.mean, r.group, r.salient, r.codes, r.step[:, 0], zero)


def _scaled_binary(r: ScaledBinary) -> Product:
    m, n = len(r.signs), len(r.salient)
    signs = torch.zeros(m, n, dtype=torch.bool)
    signs[:, ~r.salient] = r.signs
    column = torch.zeros(n)
    column[~r.salient] = r.column.float()
    binary = Scaled(sign_records(signs, r.scale[:, None], r.mean[:, None], n), column, None)
    if not bool(r.salient.any()):
        return binary
    codes = _bytes(r.codes, r.step.float(), r.zero.float())
    index = r.salient.nonzero()[:, 0]
    return Added(binary, Scaled(codes, torch.ones(len(index)), index))


def _bytes(codes: Tensor, scale: Tensor, zero: Tensor) -> Matrix:
    """Codes (m, n) uint8 on a grid a row, fp32 (m,) that fp16 has, as 8-bit integers."""
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    zeros = (zero - 128).to(torch.int8)[:, None]
    return int_records(signed, scale[:, None], zeros, 8, codes.shape[1])
