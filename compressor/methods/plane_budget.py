"""Planes for every matrix under a budget of bits: most where they spare the most error (``--planes auto``)."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


def choose_planes(
    errors: Sequence[Mapping[int, float]], bits: Sequence[Mapping[int, float]], budget: float
) -> list[int]:
    """Return a number of planes for every matrix, with bits that add up to ``budget`` at most.

    Upgrades along the lower convex hull of each matrix's (bits, error) are taken in the order of what they spare for a
    bit, as long as they fit: within one upgrade of the least sum of errors that the budget allows.

    Args:
        errors: for each matrix, number of planes -> error.
        bits: for each matrix, number of planes -> bits, rising with the number.
        budget: bits in all.

    Raises:
        ValueError: not even the fewest planes fit.
    """
    chosen = [min(each) for each in bits]
    left = budget - sum(each[planes] for each, planes in zip(bits, chosen, strict=True))
    if left < 0:
        raise ValueError(f"{budget:g} bits, and {budget - left:g} are needed for the fewest planes")
    heap: list[tuple[float, int, int]] = []

    def offer(index: int) -> None:
        gains = {}
        for planes in bits[index]:
            if planes > chosen[index]:
                cost = bits[index][planes] - bits[index][chosen[index]]
                gains[planes] = (errors[index][chosen[index]] - errors[index][planes]) / cost
        if gains and (best := max(gains, key=lambda planes: (gains[planes], planes))) and gains[best] > 0:
            heapq.heappush(heap, (-gains[best], index, best))

    for index in range(len(bits)):
        offer(index)
    while heap:
        _, index, planes = heapq.heappop(heap)
        cost = bits[index][planes] - bits[index][chosen[index]]
        if cost <= left:
            left -= cost
            chosen[index] = planes
            offer(index)
    return chosen
