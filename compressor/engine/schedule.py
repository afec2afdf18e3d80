"""The order in which windows are trained on, and the course of the learning rate: functions of the step alone, so that
a run that was interrupted goes on as if it had not been."""

from __future__ import annotations

import math

import torch

WARMUP = 0.05
"""Share of the steps in which the rate rises."""

FLOOR = 0.05
"""What is left of the rate at the end."""


def cosine(step: int, steps: int) -> float:
    """Fraction of the peak rate at ``step`` of ``steps``: a linear rise, then half a cosine down to :data:`FLOOR`."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))


class Order:
    """An endless sequence of the numbers below ``count``: one seeded permutation after the other."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, list[int]()

    def take(self, start: int, count: int) -> list[int]:
        """The entries from number ``start`` of the sequence on."""
        return [self._entry(position) for position in range(start, start + count)]

    def _entry(self, position: int) -> int:
        epoch, index = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.count, generator=generator).tolist()
        return self._permutation[index]

    def chance(self, step: int) -> float:
        """A number in [0, 1) that belongs to a step."""
        generator = torch.Generator().manual_seed(self.seed * 7_368_787 + step + 1)
        return float(torch.rand((), generator=generator))
