"""How many components each matrix keeps, under a budget for all of them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rank = int | None
"""Components kept; None: the matrix stays whole."""


@dataclass(frozen=True)
class Price:
    """What a matrix takes of the budget, in whatever unit.

    Attributes:
        each: for every component.
        whole: as it is.
        count: components that it has.
        fixed: for there being a product at all, such as scales of its rows.
    """

    each: float
    whole: float
    count: int
    fixed: float = 0.0

    def of(self, rank: Rank) -> float:
        """What the matrix takes at that rank."""
        return self.whole if rank is None else self.fixed + rank * self.each

    @property
    def most(self) -> int:
        """The largest rank that is cheaper than the whole matrix; 0 when there is none."""
        return max(0, min(math.ceil((self.whole - self.fixed) / self.each) - 1, self.count))


def capped(rank: int, price: Price) -> Rank:
    """Return ``rank``, or None where the whole matrix costs no more."""
    return rank if price.of(rank) < price.whole else None


def total(ranks: Sequence[Rank], prices: Sequence[Price]) -> float:
    """What all matrices take together."""
    return math.fsum(price.of(rank) for rank, price in zip(ranks, prices, strict=True))


def uniform_ranks(prices: Sequence[Price], budget: float) -> list[Rank]:
    """Give every matrix the same share of what it takes whole; rounded down, but not below 1."""
    share = budget / math.fsum(price.whole for price in prices)
    wanted = [max(1, math.floor((share * price.whole - price.fixed) / price.each)) for price in prices]
    return [capped(min(rank, price.count), price) for rank, price in zip(wanted, prices, strict=True)]


def energy_ranks(values: Sequence[Tensor], prices: Sequence[Price], budget: float) -> list[Rank]:
    """Leave out the components whose loss is least for what they take: water-filling, by one multiplier for all.

    At the multiplier t a matrix has the rank k, or stays whole, at which loss + t * price is least. Keeping it whole is
    worth it already where the price of a product comes near that of the matrix. What the best multiplier leaves of the
    budget is spent on single components.

    Args:
        values: of each matrix, (p,) falling: the loss that each component adds when it is left out.
        budget: the result takes no more, unless one component for every matrix does.
    """
    low, high = 1e-40, 1e40  # of the multiplier
    for _ in range(200):
        middle = math.sqrt(low * high)
        if total(at_multiplier(values, prices, middle), prices) > budget:
            low = middle
        else:
            high = middle
    ranks = at_multiplier(values, prices, high)
    return filled(ranks, prices, budget, lambda i, rank: float(values[i][rank]) / prices[i].each)


def at_multiplier(values: Sequence[Tensor], prices: Sequence[Price], t: float) -> list[Rank]:
    """Return the ranks at which loss + ``t`` * price is least: nothing is better for what they take together."""
    return [_best(value, price, t) for value, price in zip(values, prices, strict=True)]


def _best(values: Tensor, price: Price, t: float) -> Rank:
    rank = max(1, int((values > t * price.each).sum()))
    lost = float(values[rank:].sum())
    return rank if price.of(rank) < price.whole and lost + t * price.of(rank) < t * price.whole else None


def joint_ranks(
    values: Sequence[Tensor], prices: Sequence[Price], budget: float, groups: Sequence[tuple[Sequence[int], int]]
) -> list[Rank | Literal[0]]:
    """Choose as `energy_ranks` does, and for some matrices whether they are taken apart together.

    Args:
        values, prices: of single matrices, and of several stacked on each other.
        groups: (single ones, the stack of these); what is in no group is single.

    Returns:
        For everything in ``values`` its rank, or 0 for what was not chosen.
    """
    stacks = {stack for _, stack in groups}
    members = {i for single, _ in groups for i in single}
    options: list[tuple[list[int], int | None]] = [
        ([i], None) for i in range(len(values)) if i not in stacks and i not in members
    ]
    options += [(list(single), stack) for single, stack in groups]

    def at(t: float) -> list[Rank | Literal[0]]:
        found: list[Rank | Literal[0]] = [0] * len(values)
        for single, stack in options:
            ranks = {i: _best(values[i], prices[i], t) for i in single}
            apart = sum(_cost(values[i], prices[i], rank, t) for i, rank in ranks.items())
            together = None if stack is None else _best(values[stack], prices[stack], t)
            if stack is not None and together is not None and _cost(values[stack], prices[stack], together, t) < apart:
                ranks = {stack: together}
            for i, rank in ranks.items():
                found[i] = rank
        return found

    low, high = 1e-40, 1e40
    for _ in range(200):
        middle = math.sqrt(low * high)
        if total(at(middle), prices) > budget:
            low = middle
        else:
            high = middle
    chosen = at(high)
    live = [i for i, rank in enumerate(chosen) if rank != 0]
    grown = filled(
        [chosen[i] for i in live],
        [prices[i] for i in live],
        budget,
        lambda i, rank: float(values[live[i]][rank]) / prices[live[i]].each,
    )
    for i, rank in zip(live, grown, strict=True):
        chosen[i] = rank
    return chosen


def _cost(values: Tensor, price: Price, rank: Rank, t: float) -> float:
    return (0.0 if rank is None else float(values[rank:].sum())) + t * price.of(rank)


def filled(
    ranks: Sequence[Rank], prices: Sequence[Price], budget: float, gain: Callable[[int, int], float]
) -> list[Rank]:
    """Spend what is left of ``budget`` on one more component at a time, as long as one fits.

    Args:
        gain: (matrix, rank) -> what one more component is worth there for its price.
    """
    ranks = list(ranks)
    left = budget - total(ranks, prices)
    while True:
        fits = [
            (gain(i, rank), -i)
            for i, (rank, price) in enumerate(zip(ranks, prices, strict=True))
            if rank is not None and rank < price.most and price.each <= left
        ]
        if not fits:
            return ranks
        chosen = -max(fits)[1]
        rank = ranks[chosen]
        assert rank is not None
        ranks[chosen] = rank + 1
        left -= prices[chosen].each


def welore_ranks(values: Sequence[Tensor], prices: Sequence[Price], budget: float) -> list[Rank]:
    """Leave out everything below one threshold on the singular values, each spectrum stretched to [0, 1] before.

    (WeLore, arXiv 2407.11239, section 3.1; the threshold by bisection, where the publication has a table for two
    models, and the budget in parameters, where it counts ranks.)

    Args:
        values: of each matrix, (p,) falling: squares of its singular values.
    """
    stretched = []
    for value in values:
        s = value.sqrt()
        low, high = s.min(), s.max()
        stretched.append((s - low) / (high - low) if float(high) > float(low) else torch.ones_like(s))

    def at(threshold: float) -> list[Rank]:
        kept = [max(1, int((s >= threshold).sum())) for s in stretched]
        return [capped(rank, price) for rank, price in zip(kept, prices, strict=True)]

    low_t, high_t = 0.0, 1.0 + 1e-9
    for _ in range(100):
        middle = (low_t + high_t) / 2
        if total(at(middle), prices) > budget:
            low_t = middle
        else:
            high_t = middle
    return filled(at(high_t), prices, budget, lambda i, rank: float(stretched[i][rank]))
