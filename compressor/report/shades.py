"""Nine shades for values: CSS classes ``h0`` to ``h8``, of which the page says what they look like in its theme."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

COUNT = 9
NONE = "h-none"
"""Class of what has no value."""

BITS_EDGES = (1.5, 2.5, 3.5, 4.75, 6.5, 8.75, 12.0, 17.0)


@dataclass(frozen=True)
class Shade:
    """One entry of a legend."""

    css: str
    words: str


@dataclass(frozen=True)
class Scale:
    """From values to shades, and the values at both ends and in the middle in words."""

    css: Callable[[float | None], str]
    low: str
    middle: str
    high: str


def bits_css(bits: float | None) -> str:
    """The class of so many bits per weight; the same on every page, so that two pages may be held side by side."""
    return NONE if bits is None else f"h{sum(bits > edge for edge in BITS_EDGES)}"


def bits_legend(values: Sequence[float | None]) -> list[Shade]:
    """The shades in use among bits per weight, fewest bits first."""
    used = {bits_css(value) for value in values}
    words = [
        f"to {BITS_EDGES[0]:g} bits",
        *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(BITS_EDGES)),
        f"over {BITS_EDGES[-1]:g}",
    ]
    shades = [Shade(f"h{i}", word) for i, word in enumerate(words) if f"h{i}" in used]
    return [*shades, *([Shade(NONE, "no weights")] if NONE in used else [])]


def even_scale(values: Sequence[float], words: Callable[[float], str], *, logarithmic: bool = False) -> Scale:
    """Even steps between the least and the greatest of ``values``.

    Args:
        words: a value as text.
        logarithmic: even factors instead; zeros and what is below get the first shade, infinities the last.
    """
    usable = [value for value in values if math.isfinite(value) and (value > 0 or not logarithmic)]
    low, high = (min(usable), max(usable)) if usable else (0.0, 0.0)
    bend: Callable[[float], float] = math.log if logarithmic else float
    unbend: Callable[[float], float] = math.exp if logarithmic else float
    span = bend(high) - bend(low) if usable else 0.0

    def css(value: float | None) -> str:
        if value is None or math.isnan(value):
            return NONE
        if value >= high:
            return f"h{COUNT - 1}"
        if value <= low or span <= 0:
            return "h0"
        return f"h{min(COUNT - 1, int(COUNT * (bend(value) - bend(low)) / span))}"

    middle = unbend(bend(low) + span / 2) if usable else 0.0
    return Scale(css, words(low), words(middle), words(high))
