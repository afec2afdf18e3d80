"""Weights changed before they are binarized, such that binarizing them costs less (PTQ1.61's preprocessing).

The paper (arXiv 2502.13179, section 3.5) trains a low-rank change of the weights, LoRA, through the binarized model on
its training text, and then begins again. Here it is trained block by block against what the block gave before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressor.formats.dense import Dense
from compressor.methods.learned import through

RANK = 64
"""Of the change, as published; half of the shorter side where that is less."""


class PreparedLearner:
    """A weight W + B A with B and A learned, seen as the published start of PTQ1.61 would binarize it.

    Salient inputs are seen as they are.
    """

    def __init__(self, weight: Tensor, salient: Tensor) -> None:
        """Start at ``weight`` (m, n) fp32; ``salient`` (n,) bool."""
        m, n = weight.shape
        rank = max(1, min(RANK, m // 2, n // 2))
        self.start, self.salient = weight, salient
        generator = torch.Generator().manual_seed(0)
        self.right = (torch.randn(rank, n, generator=generator) / math.sqrt(n)).to(weight)
        self.left = torch.zeros(m, rank, device=weight.device)

    def parameters(self) -> list[tuple[Tensor, float]]:
        """A (r, n) and B (m, r), each at a pace that fits its size."""
        size = float(self.start.square().mean().sqrt())
        return [(self.right, 1 / math.sqrt(self.right.shape[1])), (self.left, size)]

    def _changed(self) -> Tensor:
        return self.start + self.left @ self.right

    def weight(self) -> Tensor:
        """The weight (m, n), binarized but for the salient inputs."""
        changed = self._changed()
        with torch.no_grad():
            binary = changed[:, ~self.salient]
            mean = binary.mean(1, keepdim=True) if binary.shape[1] else changed[:, :1]
            scale = (binary - mean).abs().mean(1, keepdim=True) if binary.shape[1] else torch.zeros_like(mean)
            seen = torch.where(changed >= mean, mean + scale, mean - scale)
        return torch.where(self.salient, changed, through(seen, changed))

    def finish(self) -> Dense:
        """The changed weight, fp32."""
        with torch.no_grad():
            return Dense(self._changed())
