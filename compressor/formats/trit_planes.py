"""Trit planes: a matrix as a sum of one to three planes of -1, 0 and 1, each times a scale a group of inputs.

    W[i, j] = sum over k of scale[k, i, j // group] * trits[k, i, j]

in fp32, the planes in order, then cast to the spec's dtype. The last group of a row may be shorter. The planes stand
one after the other, each five trits to a byte (:mod:`trits`) in row-major order, padded at its very end only: a plane
can be read, or dropped, without the others.

Files are canonical: scales are not negative and fall from plane to plane, so that plane 0 is the coarsest; of the
combinations of trits that give the same value, the first of :func:`trit_combinations` is used. Readers do not need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from compressor.formats.parts import Layout, Spec, check_parts, dtype_name, matrix_shape, parse_dtype
from compressor.formats.trits import TRITS_PER_BYTE, pack_trits, unpack_trits

MOST_TRIT_PLANES = 3
TRIT_CHUNK = 1 << 20
"""Weights whose value is computed at once, so that intermediates stay small beside the matrix."""


@dataclass(frozen=True, eq=False)
class TritPlanes:
    """A sum of ``K`` trit planes.

    Attributes:
        trits: (K, m, n) int8, each -1, 0 or 1.
        scale: (K, m, ceil(n / group)) fp16.
        group: how many consecutive inputs share their scales, from 1 to n (1 where n is 0).
    """

    trits: Tensor
    scale: Tensor
    group: int

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values (m, n): summed in fp32, rounded once to ``dtype``."""
        return trit_plane_values(self.trits, self.scale, self.group, dtype)

    def spec(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the spec under which it is stored; ``dtype`` is that of the unpacked matrix."""
        return {
            "format": "trit-planes",
            "shape": list(self.trits.shape[1:]),
            "dtype": dtype_name(dtype),
            "planes": self.trits.shape[0],
            "group": self.group,
        }

    def parts(self) -> dict[str, Tensor]:
        """Return what is stored: ``trits`` uint8 (K, ceil(mn / 5)) and ``scale`` as it is.

        Raises:
            ValueError: planes or scales that do not belong together, or a trit that is none.
        """
        planes, m, n = self.trits.shape
        _check_planes(planes, self.group, n)
        expected = (planes, m, -(-n // self.group))
        if self.scale.dtype != torch.float16 or self.scale.shape != expected:
            raise ValueError(f"scale must be fp16 {list(expected)}, got {self.scale.dtype} {list(self.scale.shape)}")
        return {"trits": torch.stack([pack_trits(plane) for plane in self.trits]), "scale": self.scale}

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], spec: Spec) -> TritPlanes:
        """Return what was stored, bit for bit; ValueError names a part that does not fit the spec."""
        check_parts(parts, layout_trit_planes(spec), "trit-planes")
        m, n = matrix_shape(spec)
        trits = torch.stack([unpack_trits(plane, m * n).view(m, n) for plane in parts["trits"]])
        return cls(trits, parts["scale"], spec["group"])


def unpack_trit_planes(parts: Mapping[str, Tensor], spec: Spec) -> Tensor:
    """Return the matrix (m, n) in the spec's dtype; ValueError names a part that does not fit the spec."""
    return TritPlanes.read(parts, spec).dense(parse_dtype(spec["dtype"]))


def layout_trit_planes(spec: Spec) -> Layout:
    """Return the shapes of ``trits`` and ``scale``: 1.6 + 16 / group bits a weight and plane."""
    m, n = matrix_shape(spec)
    planes, group = spec["planes"], spec["group"]
    _check_planes(planes, group, n)
    parse_dtype(spec["dtype"])
    return {
        "trits": ((planes, -(-m * n // TRITS_PER_BYTE)), torch.uint8),
        "scale": ((planes, m, -(-n // group)), torch.float16),
    }


def trit_plane_values(trits: Tensor, scale: Tensor, group: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values (m, n) in ``dtype`` of ``trits`` (K, m, n) int8 and ``scale`` (K, m, ceil(n / group)) fp16."""
    planes, m, n = trits.shape
    weight = torch.empty(m, n, dtype=dtype, device=trits.device)
    rows = max(1, TRIT_CHUNK // max(1, n))
    for start in range(0, m, rows):
        part = slice(start, start + rows)
        value = torch.zeros(weight[part].shape, device=trits.device)  # a sum that begins with +0 is never -0
        for k in range(planes):
            spread = scale[k, part].float().repeat_interleave(group, dim=1)[:, :n]
            value.addcmul_(trits[k, part].float(), spread)  # the product is exact, so that fusing changes nothing
        weight[part] = value.to(dtype)
    return weight


def trit_combinations(planes: int) -> list[tuple[int, ...]]:
    """Return all 3^K combinations of trits of one weight, in the order in which equals are preferred.

    Fewest planes first, then the finer planes (the later ones), then 1 before -1.
    """

    def rank(trits: tuple[int, ...]) -> tuple[int, list[bool], list[int]]:
        return sum(t != 0 for t in trits), [t != 0 for t in trits], [-t for t in trits]

    return sorted(product((-1, 0, 1), repeat=planes), key=rank)


def _check_planes(planes: int, group: int, n: int) -> None:
    if not 1 <= planes <= MOST_TRIT_PLANES:
        raise ValueError(f"{planes} trit planes: expected 1 to {MOST_TRIT_PLANES}")
    if not 1 <= group <= max(1, n):
        raise ValueError(f"groups of {group} among {n} inputs: expected 1 to {max(1, n)}")
