"""All formats by name, and what can be said about a packed matrix from its spec alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from compressor.formats.bitmask import layout_bitmask, unpack_bitmask
from compressor.formats.dense import layout_dense, unpack_dense
from compressor.formats.group_int import layout_group_int, unpack_group_int
from compressor.formats.low_rank import apply_low_rank, layout_low_rank, unpack_low_rank
from compressor.formats.nm import layout_nm, unpack_nm
from compressor.formats.partial_binary import layout_partial_binary, unpack_partial_binary
from compressor.formats.parts import Layout, Spec
from compressor.formats.scaled_binary import layout_scaled_binary, unpack_scaled_binary
from compressor.formats.sparse_int import layout_sparse_int, unpack_sparse_int
from compressor.formats.sum import layout_sum, unpack_sum
from compressor.formats.trit_planes import layout_trit_planes, unpack_trit_planes


@dataclass(frozen=True)
class Format:
    """A packed representation of a matrix.

    Args:
        unpack: (parts, spec) -> matrix (m, n) in the spec's dtype, bit-exact.
        layout: spec -> part name -> (shape, dtype).
        apply: (x, bias, parts, spec, dtype) -> x W^T + bias where that needs no matrix: x (..., n), bias (m,) or None,
            result (..., m), the parts decoded to ``dtype``. None: the matrix is unpacked and multiplied.
    """

    unpack: Callable[[Mapping[str, Tensor], Spec], Tensor]
    layout: Callable[[Spec], Layout]
    apply: Callable[[Tensor, Tensor | None, Mapping[str, Tensor], Spec, torch.dtype], Tensor] | None = None


FORMATS: dict[str, Format] = {
    "dense": Format(unpack_dense, layout_dense),
    "bitmask": Format(unpack_bitmask, layout_bitmask),
    "nm": Format(unpack_nm, layout_nm),
    "sparse-int": Format(unpack_sparse_int, layout_sparse_int),
    "group-int": Format(unpack_group_int, layout_group_int),
    "trit-planes": Format(unpack_trit_planes, layout_trit_planes),
    "partial-binary": Format(unpack_partial_binary, layout_partial_binary),
    "scaled-binary": Format(unpack_scaled_binary, layout_scaled_binary),
    "low-rank": Format(unpack_low_rank, layout_low_rank, apply_low_rank),
    "sum": Format(unpack_sum, layout_sum),
}


def format_of(spec: Spec) -> Format:
    """Return the format a spec names; ValueError when this version does not know it."""
    if spec.get("format") not in FORMATS:
        raise ValueError(f"unknown format {spec.get('format')!r} (known: {', '.join(FORMATS)}); a newer file?")
    return FORMATS[spec["format"]]


def borrowed(spec: Spec, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of ``parts``, of the module that ``spec`` shares a factor with, which it needs besides its own."""
    return {part: tensor for part, tensor in parts.items() if part.startswith("right_")} if "shared" in spec else {}


def nbytes(spec: Spec) -> int:
    """Return the bytes of all packed tensors of a matrix."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in format_of(spec).layout(spec).values())


def tensor_name(module: str, part: str) -> str:
    """Return the name of a part on disk and in memory: ``a.b.weight_<part>``, a dense matrix just ``a.b.weight``."""
    return f"{module}.weight" if part == "weight" else f"{module}.weight_{part}"
