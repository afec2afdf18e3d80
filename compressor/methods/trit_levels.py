"""The 3^K values that K scales give a weight, for many groups at once, and the scales that suit given trits best.

Weights stand in columns here: X (c, M) holds c inputs of M groups, the scales of which are (K, M).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.formats.trit_planes import trit_combinations
from compressor.methods.threads import matmul

LARGEST = torch.finfo(torch.float16).max
RIDGE = 1e-6


@dataclass(frozen=True)
class Levels:
    """The values that a weight can take, ascending.

    Attributes:
        scale: (K, M) fp32, what they are made of.
        value: (L, M) fp32 with L = 3^K, symmetric about the zero in the middle.
        middle: ((L - 1) / 2, M), halfway between neighbours of the upper half, the zero included.
        trits: (K, L, M) fp32, the combination behind each; equal values have the same, the first of
            `trit_combinations`.
    """

    scale: Tensor
    value: Tensor
    middle: Tensor
    trits: Tensor

    @classmethod
    def of(cls, scale: Tensor) -> Levels:
        """Return the levels for ``scale`` (K, M) fp32, of any sign and order."""
        table = torch.tensor(trit_combinations(len(scale)), dtype=scale.dtype, device=scale.device)
        value, order = _sum_of_planes(table.T[:, :, None], scale).sort(dim=0, stable=True)
        for i in range(1, len(order)):
            order[i] = torch.where(value[i] == value[i - 1], order[i - 1], order[i])
        half = len(table) // 2
        return cls(scale, value, (value[half + 1 :] + value[half:-1]) / 2, table.T[:, order])

    def nearest(self, x: Tensor) -> Tensor:
        """Return the index (M,) int64 of the level nearest to ``x`` (M,); halfway, of the one nearer to zero."""
        above = (x.abs() > self.middle).sum(0, dtype=torch.uint8).long()
        return torch.where(x < 0, -above, above).add_(len(self.middle))

    def nearest_all(self, X: Tensor) -> Tensor:
        """Return the indices (c, M) int64 for ``X`` (c, M)."""
        return torch.stack([self.nearest(x) for x in X])

    def planes(self, index: Tensor) -> list[Tensor]:
        """Return the K planes, (c, M) fp32 each, of indices (c, M)."""
        return [plane.gather(0, index) for plane in self.trits]

    def moved(self, scale: Tensor) -> tuple[Levels, Tensor]:
        """Give the trits other scales.

        Args:
            scale: (K, M) fp32, of any sign and order; brought into the stored form.

        Returns:
            (levels, moved): those of ``canonical(scale)``, and (L, M) int64, the index there of each combination here.
        """
        sign = torch.where(scale < 0, -1.0, 1.0)
        stored, order = representable(scale).sort(dim=0, descending=True, stable=True)
        trits = (self.trits * sign[:, None]).gather(0, order[:, None].expand_as(self.trits))
        levels = Levels.of(stored)
        return levels, levels.nearest_all(_sum_of_planes(trits, stored))


def representable(scale: Tensor) -> Tensor:
    """Return |scale| as fp16 stores it, in fp32; beyond its range its largest number."""
    return scale.abs().clamp(max=LARGEST).half().float()


def canonical(scale: Tensor) -> Tensor:
    """Return ``scale`` (K, M) in the stored form: as fp16, not negative, falling from plane to plane."""
    return representable(scale).sort(dim=0, descending=True).values


def best_scales(planes: list[Tensor], metric: Tensor, pull: Tensor) -> Tensor:
    """Return the scales (K, M) fp32 that minimise (x - q) A (x - q)^T for fixed trits, by the normal equations.

    Args:
        planes: K times (c, M).
        metric: A, (c, c), or (c, 1) for a diagonal.
        pull: A X, (c, M).
    """
    weighed = [times(metric, plane) for plane in planes]
    gram = torch.stack([torch.stack([(s * z).sum(0) for z in weighed], dim=-1) for s in planes], dim=-2).double()
    right = torch.stack([(plane * pull).sum(0) for plane in planes], dim=-1).double()
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    gram.diagonal(dim1=-2, dim2=-1).add_((trace * RIDGE + torch.finfo(torch.float32).tiny)[:, None])
    solved: Tensor = torch.linalg.solve(gram, right).T.float()
    return solved


def times(metric: Tensor, X: Tensor) -> Tensor:
    """Return A X for the metric A (c, c), or (c, 1) for a diagonal, and X (c, M)."""
    return metric * X if metric.shape[1] == 1 else matmul(metric, X)


def _sum_of_planes(trits: Tensor, scale: Tensor) -> Tensor:
    """Return (L, M): the planes (K, L, M or 1) in order, as the reader sums them."""
    value = torch.zeros(trits.shape[1], scale.shape[1], dtype=scale.dtype, device=scale.device)
    for plane, a in zip(trits, scale, strict=True):
        value.addcmul_(plane, a)
    return value
