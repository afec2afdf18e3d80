"""A coded matrix, or a dense one, and a low-rank one that makes up for its error: their sum.

    W = base + correction

each in fp32, then cast to the spec's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.formats.leaf import LEAVES, Leaf, layout_leaf, leaf_parts, parts_below, read_leaf
from compressor.formats.low_rank import LowRank, layout_low_rank
from compressor.formats.parts import Layout, Spec, dtype_name, matrix_shape, parse_dtype


@dataclass(frozen=True, eq=False)
class Sum:
    """``base`` (m, n) plus ``correction`` (m, n). A dense base should hold numbers that its stored dtype has."""

    base: Leaf
    correction: LowRank

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values (m, n), summed in fp32."""
        # into the product, which is always a new tensor: a dense base is the caller's own
        return self.correction.dense(torch.float32).add_(self.base.dense(torch.float32)).to(dtype)

    def spec(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the spec under which it is stored; ``dtype`` is that of the summed matrix."""
        base, correction = self.base.spec(dtype), self.correction.spec(dtype)
        common = {"shape": base["shape"], "dtype": dtype_name(dtype)}
        return {"format": "sum", **common, "base": base, "correction": correction}

    def parts(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return the parts of both, ``base_...`` and ``correction_...``; a dense base is rounded to ``dtype``."""
        found = {"base": leaf_parts(self.base, dtype), "correction": self.correction.parts()}
        return {f"{term}_{part}": tensor for term, parts in found.items() for part, tensor in parts.items()}

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], spec: Spec) -> Sum:
        """Return what was stored, bit for bit; ValueError names a part that does not fit the spec."""
        layout_sum(spec)
        if stray := [part for part in parts if part.partition("_")[0] not in ("base", "correction")]:
            raise ValueError(f"sum: unexpected part {stray[0]!r}")
        correction = LowRank.read(parts_below(parts, "correction"), spec["correction"])
        return cls(read_leaf(parts_below(parts, "base"), spec["base"]), correction)


def unpack_sum(parts: Mapping[str, Tensor], spec: Spec) -> Tensor:
    """Return the matrix (m, n) in the spec's dtype; ValueError names a part that does not fit the spec."""
    return Sum.read(parts, spec).dense(parse_dtype(spec["dtype"]))


def layout_sum(spec: Spec) -> Layout:
    """Return the shapes of the parts of both terms; ValueError when these do not belong together."""
    parse_dtype(spec["dtype"])
    base, correction = spec["base"], spec["correction"]
    if base["format"] not in LEAVES or correction["format"] != "low-rank":
        raise ValueError(
            f"a sum of {base['format']!r} and {correction['format']!r}: expected a code or dense, and low-rank"
        )
    if not matrix_shape(spec) == matrix_shape(base) == matrix_shape(correction):
        raise ValueError(f"terms {base['shape']} and {correction['shape']} do not make a matrix {spec['shape']}")
    layouts = {"base": layout_leaf(base), "correction": layout_low_rank(correction)}
    return {f"{term}_{part}": entry for term, layout in layouts.items() for part, entry in layout.items()}
