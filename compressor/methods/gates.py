"""Positions of truncation that can be learned: every matrix keeps its first components, up to a soft edge.

(Dobi-SVD, arXiv 2502.02723, section 3.1: component i is let through by 1/2 tanh(beta (k - i)) + 1/2, and k is learned.
There the components are those of each batch's own activations, and every step differentiates an SVD, as in
`run/gates_paper.py`; here they are fixed beforehand (`subspace`), so that a step is an ordinary one, also where a
matrix has fewer of them than a window has tokens. The published penalty on the budget is a projection here: the
positions always take what they may.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.methods.ranks import Price, Rank, capped, filled

SOFTNESS = 0.02
"""Width of the edge, as a share of all components of a matrix."""


PUBLISHED_EDGE = 0.05
"""Width of the edge in components, as published: 1/2 tanh(beta x) + 1/2 is the sigmoid of x over 1 / (2 beta)."""


def openness(position: Tensor, count: int, edge: float | None = None) -> Tensor:
    """Return how far each of ``count`` components is let through, (count,) in (0, 1), falling.

    Differentiable, and rising everywhere, in ``position`` (a scalar, in components).

    Args:
        edge: its width, in components; by default some of all components.
    """
    edge = edge or max(0.5, SOFTNESS * count)
    places = torch.arange(count, dtype=position.dtype, device=position.device) + 0.5
    return torch.sigmoid((position - places) / edge)


@dataclass(frozen=True)
class Room:
    """What positions may be.

    Attributes:
        prices: what they take.
        budget: what all take together.
    """

    prices: Sequence[Price]
    budget: float

    def project(self, shares: Tensor) -> Tensor:
        """Return the shares of components kept (matrices,), all moved by as much so that they take the budget.

        None goes below one component, or above what a product may have.
        """
        counts = torch.tensor([price.count for price in self.prices], dtype=shares.dtype)
        each = torch.tensor([price.each for price in self.prices], dtype=shares.dtype)
        most = torch.tensor([price.most for price in self.prices], dtype=shares.dtype)
        free = self.budget - sum(price.fixed for price in self.prices)
        low, high = -2.0, 2.0
        for _ in range(60):
            middle = (low + high) / 2
            kept = ((shares + middle) * counts).clamp(min=1).minimum(most)
            if float((kept * each).sum()) > free:
                high = middle
            else:
                low = middle
        return ((shares + low) * counts).clamp(min=1).minimum(most) / counts

    def ranks(self, shares: Tensor) -> list[Rank]:
        """Return whole numbers of components for ``shares`` (matrices,), within the budget."""
        wanted = [float(share) * price.count for share, price in zip(shares, self.prices, strict=True)]
        floors = [capped(max(1, int(rank)), price) for rank, price in zip(wanted, self.prices, strict=True)]
        return filled(floors, self.prices, self.budget, lambda i, rank: wanted[i] - rank)
