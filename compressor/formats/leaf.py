"""The forms of a matrix of which others are put together: the factors of a product, the base of a sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from compressor.formats.dense import Dense, layout_dense
from compressor.formats.group_int import GroupInt, layout_group_int
from compressor.formats.partial_binary import PartialBinary, layout_partial_binary
from compressor.formats.parts import Layout, Spec
from compressor.formats.scaled_binary import ScaledBinary, layout_scaled_binary
from compressor.formats.trit_planes import TritPlanes, layout_trit_planes

Leaf = Dense | GroupInt | TritPlanes | PartialBinary | ScaledBinary
LEAVES: Final[dict[str, tuple[type[Leaf], Callable[[Spec], Layout]]]] = {
    "dense": (Dense, layout_dense),
    "group-int": (GroupInt, layout_group_int),
    "trit-planes": (TritPlanes, layout_trit_planes),
    "partial-binary": (PartialBinary, layout_partial_binary),
    "scaled-binary": (ScaledBinary, layout_scaled_binary),
}
"""Format -> its class, and its layout on paper."""


def leaf_parts(leaf: Leaf, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the parts of ``leaf``; values, where it has any, in ``dtype``."""
    return leaf.parts(dtype) if isinstance(leaf, Dense | GroupInt) else leaf.parts()


def read_leaf(parts: Mapping[str, Tensor], spec: Spec) -> Leaf:
    """Return what was stored, bit for bit; ValueError names a part that does not fit the spec."""
    return LEAVES[spec["format"]][0].read(parts, spec)


def layout_leaf(spec: Spec) -> Layout:
    """Return the shapes of the parts; ValueError for a format that is no leaf."""
    if spec["format"] not in LEAVES:
        raise ValueError(f"format {spec['format']!r} inside another: expected one of {', '.join(LEAVES)}")
    return LEAVES[spec["format"]][1](spec)


def parts_below(parts: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the parts whose name starts with ``prefix_``, without it."""
    return {name[len(prefix) + 1 :]: part for name, part in parts.items() if name.startswith(f"{prefix}_")}
