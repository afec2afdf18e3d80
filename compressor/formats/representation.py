"""What a compressed weight is made of: the form in which the stages of a chain hand it on, and how it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.formats.bitmask import bitmask_kept, pack_bitmask, unpack_bitmask
from compressor.formats.dense import Dense
from compressor.formats.group_int import GroupInt
from compressor.formats.low_rank import LowRank
from compressor.formats.nm import nm_kept, pack_nm, unpack_nm
from compressor.formats.partial_binary import PartialBinary
from compressor.formats.parts import Spec, check_mask, dtype_name
from compressor.formats.registry import format_of, nbytes
from compressor.formats.scaled_binary import ScaledBinary
from compressor.formats.sparse_int import grid_values, pack_sparse_int, sparse_int_codes
from compressor.formats.sum import Sum
from compressor.formats.trit_planes import TritPlanes


@dataclass(frozen=True, eq=False)
class Masked:
    """A matrix ``weight`` (m, n) of which only ``mask`` (m, n) bool is kept; what lies outside counts as +0.

    ``pattern`` is (N, M) when at most N of every M consecutive inputs are kept.
    """

    weight: Tensor
    mask: Tensor
    pattern: tuple[int, int] | None = None

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the matrix (m, n) with +0 outside the mask, in ``dtype`` or as it is."""
        return self.weight.to(dtype or self.weight.dtype).masked_fill(~self.mask, 0)

    def spec(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the spec under which :func:`pack` stores it: the cheapest of dense, bitmask and nm."""
        return choose(self.weight, self.mask, self.pattern, dtype)


@dataclass(frozen=True, eq=False)
class SparseInt:
    """Codes on one affine grid a row: value = (code - zero) * scale in fp32, kept where ``mask``.

    ``codes`` (m, n) uint8 below 2**bits where kept, ``scale`` (m,) fp16, ``zero`` (m,) uint8, ``mask`` (m, n) bool.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    mask: Tensor
    bits: int

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values (m, n) with +0 outside the mask."""
        return grid_values(self.codes, self.scale, self.zero, self.mask, dtype)

    def spec(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the spec under which :func:`pack` stores it; ``dtype`` is that of the unpacked matrix."""
        return {
            "format": "sparse-int",
            "shape": list(self.codes.shape),
            "dtype": dtype_name(dtype),
            "nnz": int(torch.count_nonzero(self.mask)),
            "bits": self.bits,
        }


Representation = Dense | Masked | SparseInt | GroupInt | TritPlanes | PartialBinary | ScaledBinary | LowRank | Sum

CODED: dict[str, type[GroupInt | TritPlanes | PartialBinary | ScaledBinary | LowRank | Sum]] = {
    "group-int": GroupInt,
    "trit-planes": TritPlanes,
    "partial-binary": PartialBinary,
    "scaled-binary": ScaledBinary,
    "low-rank": LowRank,
    "sum": Sum,
}
"""Format -> the representation that knows how to store and read itself."""


def choose(
    weight: Tensor, mask: Tensor, pattern: tuple[int, int] | None = None, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Return the cheapest lossless spec for the kept entries of a matrix.

    Args:
        weight: (m, n); only its shape and dtype are looked at.
        mask: (m, n) bool, True = kept.
        pattern: (N, M) when at most N of M consecutive inputs are kept.
        dtype: that of the stored values; by default the weight's.

    Returns:
        A dense, bitmask or nm spec; the plainest one among equals.
    """
    check_mask(weight, mask)
    common = {"shape": list(weight.shape), "dtype": dtype_name(dtype or weight.dtype)}
    candidates: list[dict[str, Any]] = [
        {"format": "dense", **common},
        {"format": "bitmask", **common, "nnz": int(torch.count_nonzero(mask))},
    ]
    if pattern is not None:
        candidates.append({"format": "nm", **common, "n": pattern[0], "m": pattern[1]})
    return min(candidates, key=nbytes)


def pack(representation: Representation, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Store a representation.

    Args:
        representation: what to store.
        dtype: of the stored values, and of the matrix when unpacked. fp32 values are rounded to it here, once.

    Returns:
        (spec, parts): the entry of the manifest, and the tensors ``weight_<part>``.
    """
    spec = representation.spec(dtype)
    if isinstance(representation, Dense | GroupInt | Sum):
        return spec, representation.parts(dtype)
    if isinstance(representation, TritPlanes | PartialBinary | ScaledBinary | LowRank):
        return spec, representation.parts()
    if isinstance(representation, SparseInt):
        r = representation
        return spec, pack_sparse_int(r.codes, r.scale, r.zero, r.mask, r.bits)
    weight, mask = representation.weight.to(dtype), representation.mask
    if spec["format"] == "nm":
        return spec, pack_nm(weight, mask, spec["n"], spec["m"])
    if spec["format"] == "bitmask":
        return spec, pack_bitmask(weight, mask)
    return spec, Dense(weight.masked_fill(~mask, 0)).parts(dtype)


def unpack(spec: Spec, parts: Mapping[str, Tensor]) -> Representation:
    """Return what was packed, mask included (for nm with the positions that were filled up counted as kept).

    Raises:
        ValueError: the spec names an unknown format, or a part does not fit it.
    """
    name = spec["format"]
    if name in CODED:
        return CODED[name].read(parts, spec)
    if name == "bitmask":
        return Masked(unpack_bitmask(parts, spec), bitmask_kept(parts, spec))
    if name == "nm":
        return Masked(unpack_nm(parts, spec), nm_kept(parts, spec), (spec["n"], spec["m"]))
    if name == "sparse-int":
        codes, scale, zero, mask = sparse_int_codes(parts, spec)
        return SparseInt(codes, scale, zero, mask, spec["bits"])
    format_of(spec)
    return Dense.read(parts, spec)
