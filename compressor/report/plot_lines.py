"""Lines over a number that grows: tokens trained on, distance, context. Small panels; the legend is the page's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from compressor.report.plot_layers import Axis
from compressor.report.plots import line, picture, round_ticks, text

WIDTH, HEIGHT = 360.0, 214.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 352.0, 24.0, 176.0
DRAWN = 160  # points of a line: more than its pixels help nobody
DOTS = 24  # points up to which each gets a mark


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: for the tooltip and for those who cannot see it.
        css: its colour: dense, compressed, baseline, odd, or faint.
        points: (x, y, standard error of y or None), by x; what is not finite leaves a gap.
    """

    name: str
    css: str
    points: Sequence[tuple[float, float, float | None]]

    def thinned(self) -> list[tuple[float, float, float | None]]:
        """At most about ``DRAWN`` points, the last one included."""
        every = max(1, math.ceil(len(self.points) / DRAWN))
        return [*self.points[:-1:every], *self.points[-1:]]


def even_axis(values: Sequence[float], words: Callable[[float], str], *, zero: bool = True) -> Axis:
    """An even axis that holds all finite ``values``, and 0 unless told otherwise."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min([0.0, *finite] if zero else finite), max([0.0, *finite] if zero else finite)
    step = round_ticks(high - low if high > low else 1.0, 4)[1]
    first, last = math.floor(low / step + 1e-9), max(1, math.ceil(high / step - 1e-9))
    start, span = first * step, (last - first) * step
    ticks = tuple((index * step, words(index * step)) for index in range(first, last + 1))
    return Axis(lambda value: (value - start) / span, ticks)


def decades_axis(values: Sequence[float], words: Callable[[float], str]) -> Axis:
    """A logarithmic axis around the positive ``values``; what is not positive stands at its foot."""
    logs = [math.log10(value) for value in values if value > 0 and math.isfinite(value)]
    low, high = min(logs, default=0.0), max(logs, default=1.0)
    pad = max(0.06 * (high - low), 0.1)
    low, high = low - pad, high + pad
    factors = (1,) if high - low > 2 else (1, 3) if high - low > 1 else (1, 2, 5)
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    inside = [tick for tick in ticks if low <= math.log10(tick) <= high]
    inside = inside[:: max(1, math.ceil(len(inside) / 6))]

    def place(value: float) -> float:
        return min(1.0, max(0.0, (math.log10(value) - low) / (high - low))) if value > 0 else 0.0

    return Axis(place, tuple((tick, words(tick)) for tick in inside))


def steps_axis(values: Sequence[float], words: Callable[[float], str]) -> Axis:
    """A logarithmic axis with a tick at every one of some few positive ``values``; evenly spaced where they double."""
    logs = [math.log(value) for value in sorted(set(values))]
    low, span = min(logs, default=0.0), (max(logs, default=1.0) - min(logs, default=0.0)) or 1.0
    lone = len(logs) < 2

    def place(value: float) -> float:
        return 0.5 if lone else 0.05 + 0.9 * (math.log(value) - low) / span

    return Axis(place, tuple((value, words(value)) for value in sorted(set(values))))


def line_plot(
    series: Sequence[Series],
    x_axis: Axis,
    y_axis: Axis,
    *,
    title: str,
    x_name: str,
    y_name: str,
    key: str,
    words: Callable[[float], str],
    shaded: tuple[float, str] | None = None,
) -> Markup:
    """Draw lines, the first ones lowest.

    Args:
        x_name, y_name: what the axes are.
        key: unique in the page.
        words: a y as text, for tooltips.
        shaded: from this x on the ground is shaded, and what that means.
    """

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + x_axis.place(x) * (RIGHT - LEFT), BOTTOM - y_axis.place(y) * (BOTTOM - TOP)

    body = [text(2, 11, y_name, "label")]
    if shaded is not None:
        before = [tick for tick, _ in x_axis.ticks if tick < shaded[0]]
        x = (at(before[-1], 0)[0] + at(shaded[0], 0)[0]) / 2 if before else LEFT
        body.append(
            f'<rect x="{x:.1f}" y="{TOP:.1f}" width="{RIGHT - x:.1f}" height="{BOTTOM - TOP:.1f}" class="beyond">'
            f"<title>{escape(shaded[1])}</title></rect>"
        )
        body.append(text(RIGHT, TOP - 4, shaded[1], "tick", "end"))
    for tick, name in y_axis.ticks:
        y = at(x_axis.ticks[0][0], tick)[1]
        body += [line(LEFT, y, RIGHT, y, "axis" if tick == 0 else "grid"), text(LEFT - 5, y + 3.5, name, "tick", "end")]
    for tick, name in x_axis.ticks:
        x = at(tick, 0)[0]
        body += [line(x, BOTTOM, x, BOTTOM + 4, "axis"), text(x, BOTTOM + 15, name, "tick", "middle")]
    body += [line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis"), text(RIGHT, HEIGHT - 4, x_name, "label", "end")]
    told = []
    for entry in series:
        body += _drawn(entry, at, words)
        ends = [y for _, y, _ in entry.points if math.isfinite(y)]
        if ends and entry.css != "faint":
            told.append(f"{entry.name}: {words(ends[0])} to {words(ends[-1])}")
    return picture(WIDTH, HEIGHT, title, "; ".join(told) or "not measured", body, key)


def _drawn(
    series: Series, at: Callable[[float, float], tuple[float, float]], words: Callable[[float], str]
) -> list[str]:
    body: list[str] = []
    trail: list[str] = []
    for x, y, _ in series.thinned():
        if math.isfinite(y):
            px, py = at(x, y)
            trail.append(f"{'L' if trail and trail[-1] else 'M'}{px:.2f} {py:.2f}")
        else:
            trail.append("")
    body.append(
        f'<path d="{"".join(trail)}" class="curve of-{series.css}"><title>{escape(series.name)}</title></path>'
        if any(trail)
        else ""
    )
    if len(series.points) > DOTS or series.css == "faint":
        return body
    for x, y, error in series.points:
        if not math.isfinite(y):
            continue
        px, py = at(x, y)
        if error is not None and math.isfinite(error):
            body.append(line(px, at(x, y - error)[1], px, at(x, y + error)[1], f"curve thin of-{series.css}"))
        body.append(
            f'<circle cx="{px:.2f}" cy="{py:.2f}" r="3.2" class="{series.css}">'
            f"<title>{escape(f'{series.name}: {words(y)}')}</title></circle>"
        )
    return body
