"""Axes between the least and the greatest of some values, logarithmic where they span much."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from compressor.report.plot_layers import Axis
from compressor.report.plots import round_ticks

LOG_FROM, LOG_BYTES_FROM = 5.0, 3.0  # greatest over least; beyond it an axis is logarithmic
PAD = 0.07  # of the axis, left free at either end
FACTORS: tuple[tuple[float, ...], ...] = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.5, 2, 3, 5, 7),
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8),
)


def span_axis(
    values: Sequence[float], words: Callable[[float], str], wanted: int, log_from: float = LOG_FROM
) -> tuple[Axis, bool]:
    """An axis from just below the least to just above the greatest of positive ``values``, and whether it is log.

    Args:
        words: a tick as text.
        wanted: about how many ticks.
        log_from: greatest over least from which on it is.
    """
    low, high = min(values), max(values)
    logarithmic = low > 0 and high > log_from * low
    bend: Callable[[float], float] = math.log if logarithmic else float
    span = (bend(high) - bend(low)) or 0.2 * abs(high) or 1.0
    start, end = bend(low) - PAD * span, bend(high) + PAD * span
    if not logarithmic and low >= 0:
        start = max(start, 0.0)
    ticks = _log_ticks(math.exp(start), math.exp(end), wanted) if logarithmic else _even_ticks(start, end, wanted)
    return Axis(lambda value: (bend(value) - start) / (end - start), tuple((tick, words(tick)) for tick in ticks)), (
        logarithmic
    )


def _even_ticks(start: float, end: float, wanted: int) -> list[float]:
    step = round_ticks(end - start, wanted)[1]
    return [index * step for index in range(math.ceil(start / step - 1e-9), math.floor(end / step + 1e-9) + 1)]


def _log_ticks(start: float, end: float, wanted: int) -> list[float]:
    """The coarsest of ``FACTORS`` that gives half of ``wanted``; thinned out where even whole decades are too many."""
    powers = range(math.floor(math.log10(start)), math.ceil(math.log10(end)) + 1)
    ticks: list[float] = []
    for factors in FACTORS:
        ticks = [factor * 10.0**power for power in powers for factor in factors if start <= factor * 10.0**power <= end]
        if 2 * len(ticks) > wanted:
            break
    return ticks[:: max(1, math.ceil(len(ticks) / (wanted + 2)))]
