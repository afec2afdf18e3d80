"""The matrix as it is: what a manifest says for a matrix that no other format makes smaller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.formats.parts import Layout, Spec, check_parts, dtype_name, matrix_shape, parse_dtype


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix ``weight`` (m, n), any float dtype, without structure."""

    weight: Tensor

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the matrix (m, n), in ``dtype`` or as it is."""
        return self.weight if dtype is None else self.weight.to(dtype)

    def spec(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the spec under which it is stored."""
        return {"format": "dense", "shape": list(self.weight.shape), "dtype": dtype_name(dtype)}

    def parts(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the one part ``weight`` (m, n), in ``dtype``."""
        return {"weight": self.weight.to(dtype)}

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], spec: Spec) -> Dense:
        """Return what was stored; ValueError names a part that does not fit the spec."""
        return cls(unpack_dense(parts, spec))


def unpack_dense(parts: Mapping[str, Tensor], spec: Spec) -> Tensor:
    """Return the matrix (m, n); ValueError names a part that does not fit the spec."""
    check_parts(parts, layout_dense(spec), "dense")
    return parts["weight"]


def layout_dense(spec: Spec) -> Layout:
    """Return ``{"weight": ((m, n), spec dtype)}``."""
    return {"weight": (matrix_shape(spec), parse_dtype(spec["dtype"]))}
