"""A matrix as the product of a tall and a wide one, each stored as it is or as a code.

    W = left right, (m, r) times (r, n)

multiplied in fp64, where products of such factors are exact and their sums all but exact, so that the result does not
depend on the order of summation; then cast to the spec's dtype, once. A layer does not multiply them: y = (x right^T)
left^T, in the dtype in which it computes, is less work and forms no matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compressor.formats.leaf import Leaf, layout_leaf, leaf_parts, parts_below, read_leaf
from compressor.formats.parts import Layout, Spec, dtype_name, matrix_shape, parse_dtype

LOW_RANK_CHUNK = 1 << 21
"""Values that are multiplied at once in fp64, so that intermediates stay small beside the matrix."""

FACTOR_DTYPE = torch.float16
"""Of a factor that is no code: the half precision with more digits; the factors are balanced to fit its range."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """A product of ``left`` (m, r) and ``right`` (r, n).

    ``shared`` names the module beside which the right factor is stored, where that is another one.
    """

    left: Leaf
    right: Leaf
    shared: str | None = None

    @property
    def rank(self) -> int:
        """Columns of ``left``, rows of ``right``."""
        return int(self.spec(torch.float32)["left"]["shape"][1])

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the product (m, n), rounded once to ``dtype``."""
        left, right = self.left.dense(torch.float32), self.right.dense(torch.float64)
        weight = torch.empty(len(left), right.shape[1], dtype=dtype, device=left.device)
        rows = max(1, LOW_RANK_CHUNK // max(1, right.shape[1]))
        for start in range(0, len(left), rows):
            part = slice(start, start + rows)
            weight[part] = (left[part].double() @ right).to(dtype)
        return weight

    def spec(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the spec under which it is stored; ``dtype`` is that of the multiplied matrix."""
        left, right = self.left.spec(FACTOR_DTYPE), self.right.spec(FACTOR_DTYPE)
        return {
            "format": "low-rank",
            "shape": [left["shape"][0], right["shape"][1]],
            "dtype": dtype_name(dtype),
            "left": left,
            "right": right,
            **({"shared": self.shared} if self.shared is not None else {}),
        }

    def parts(self) -> dict[str, Tensor]:
        """Return the parts of both factors, ``left_...`` and ``right_...``; not those that are stored elsewhere."""
        sides = {"left": self.left} if self.shared is not None else {"left": self.left, "right": self.right}
        found = {side: leaf_parts(factor, FACTOR_DTYPE) for side, factor in sides.items()}
        return {f"{side}_{part}": tensor for side, parts in found.items() for part, tensor in parts.items()}

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], spec: Spec) -> LowRank:
        """Return what was stored, bit for bit; ValueError names a part that does not fit the spec.

        ``parts`` has those of the right factor in any case, wherever they are stored.
        """
        layout_low_rank(spec)
        sides = {side: parts_below(parts, side) for side in ("left", "right")}
        if stray := [part for part in parts if part.partition("_")[0] not in sides]:
            raise ValueError(f"low-rank: unexpected part {stray[0]!r}")
        left, right = (read_leaf(sides[side], spec[side]) for side in ("left", "right"))
        return cls(left, right, spec.get("shared"))


def unpack_low_rank(parts: Mapping[str, Tensor], spec: Spec) -> Tensor:
    """Return the matrix (m, n) in the spec's dtype; ValueError names a part that does not fit the spec."""
    return LowRank.read(parts, spec).dense(parse_dtype(spec["dtype"]))


def apply_low_rank(
    x: Tensor, bias: Tensor | None, parts: Mapping[str, Tensor], spec: Spec, dtype: torch.dtype
) -> Tensor:
    """Return ``(x right^T) left^T + bias``, one thin product after the other; gradients reach ``x`` and ``bias``.

    Args:
        x: (..., n).
        bias: (m,), or None.
        parts, spec: what was stored.
        dtype: to which both factors are rounded; that of ``x``, or what autocast finds instead.

    Returns:
        (..., m).

    Raises:
        ValueError: names a part that does not fit the spec.
    """
    with torch.no_grad():
        factors = LowRank.read(parts, spec)
        left, right = factors.left.dense(dtype), factors.right.dense(dtype)
    return F.linear(F.linear(x, right), left, bias)


def layout_low_rank(spec: Spec) -> Layout:
    """Return the shapes of the parts that are stored here; ValueError when the factors do not belong together."""
    m, n = matrix_shape(spec)
    parse_dtype(spec["dtype"])
    (rows, rank), (inner, columns) = matrix_shape(spec["left"]), matrix_shape(spec["right"])
    if (rows, columns) != (m, n) or rank != inner:
        raise ValueError(f"factors {rows} x {rank} and {inner} x {columns} do not make a {m} x {n} matrix")
    stored = ("left",) if "shared" in spec else ("left", "right")
    return {f"{side}_{part}": entry for side in stored for part, entry in layout_leaf(spec[side]).items()}
