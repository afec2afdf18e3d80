"""The matrix as it is: what a manifest says for a matrix that no other format makes smaller."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from compressor.formats.parts import Layout, Spec, check_parts, matrix_shape, parse_dtype


def pack_dense(weight: Tensor) -> dict[str, Tensor]:
    """Return the one part ``weight`` (m, n)."""
    return {"weight": weight}


def unpack_dense(parts: Mapping[str, Tensor], spec: Spec) -> Tensor:
    """Return the matrix (m, n); ValueError names a part that does not fit the spec."""
    check_parts(parts, layout_dense(spec), "dense")
    return parts["weight"]


def layout_dense(spec: Spec) -> Layout:
    """Return ``{"weight": ((m, n), spec dtype)}``."""
    return {"weight": (matrix_shape(spec), parse_dtype(spec["dtype"]))}
