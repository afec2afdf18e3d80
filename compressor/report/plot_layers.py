"""One value of every layer, as small panels: one a kind of layer, one bar a block. Readable from 1 to 600 blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from compressor.report.numbers import percent
from compressor.report.plots import Panel, bar, line, picture, round_ticks, text
from compressor.report.schema import Layer

WIDE_FROM = 120  # blocks; from here on a panel takes the whole width of the page


@dataclass(frozen=True)
class Axis:
    """Maps a value to 0..1 of the height, and names a few values on the way."""

    place: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]


def log_axis(values: Sequence[float]) -> Axis:
    """Whole decades around the positive ``values``; ticks at 1, 2, 5 when there are few decades. Zeros stand at 0."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    low = math.floor(math.log10(min(positive, default=0.01)) + 1e-9)
    high = max(math.ceil(math.log10(max(positive, default=0.1)) - 1e-9), low + 1)
    decades = high - low
    factors = (1, 2, 5) if decades == 1 else (1,)
    every = max(1, math.ceil(decades / 4))
    ticks = [factor * 10.0**power for power in range(low, high + 1) for factor in factors if (power - low) % every == 0]

    def place(value: float) -> float:
        if value <= 0:
            return 0.0
        return min(1.0, max(0.02, (math.log10(value) - low) / decades)) if math.isfinite(value) else 1.0

    kept = tuple((tick, _short_percent(tick)) for tick in ticks if tick <= 10.0**high * 1.001)
    return Axis(place, kept)


def linear_axis(largest: float) -> Axis:
    """From 0 to the next round step from ``largest`` on, in percent."""
    ticks = round_ticks(largest if largest > 0 else 1.0, 4)
    if ticks[-1] < largest * 0.999:
        ticks.append(ticks[-1] + ticks[1])
    top = ticks[-1]
    return Axis(lambda value: min(1.0, value / top), tuple((tick, _short_percent(tick)) for tick in ticks))


def _short_percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %" if fraction >= 1e-6 or fraction == 0 else f"{100 * fraction:.0e} %"


def layer_panels(
    layers: Sequence[Layer], value: Callable[[Layer], float | None], axis: Axis, what: str, key: str
) -> list[Panel]:
    """One panel for each ``kind`` in order of appearance, all on the same ``axis``.

    Several layers of one kind in a block (experts) are shown by their median, with a line from least to greatest.
    Layers without a value leave a gap; those with a fallback or a rung of the ladder carry a triangle.
    """
    blocks = 1 + max((layer.block for layer in layers), default=0)
    kinds: dict[str, dict[int, list[Layer]]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, {}).setdefault(layer.block, []).append(layer)
    return [
        Panel(kind, _panel(by_block, blocks, value, axis, f"{what}, {kind}", f"{key}{index}"), blocks > WIDE_FROM)
        for index, (kind, by_block) in enumerate(kinds.items())
    ]


def _panel(
    by_block: dict[int, list[Layer]],
    blocks: int,
    value: Callable[[Layer], float | None],
    axis: Axis,
    title: str,
    key: str,
) -> Markup:
    width = 1072.0 if blocks > WIDE_FROM else 270.0
    left, top, bottom = 40.0, 10.0, 92.0
    pitch = (width - left - 4) / blocks
    thick = min(26.0, pitch * (0.8 if pitch > 3 else 1.0))
    body: list[str] = []
    for tick, words in axis.ticks:
        y = bottom - axis.place(tick) * (bottom - top) if tick > 0 else bottom
        if abs(axis.place(tick) - 0.02) < 1e-9:  # the lowest tick of a log axis is the axis itself
            y = bottom
        body += [line(left, y, width, y, "grid"), text(left - 5, y + 3.5, words, "tick", "end")]
    measured: list[tuple[float, str]] = []
    for block, layers in sorted(by_block.items()):
        values = sorted(v for v in (value(layer) for layer in layers) if v is not None)
        centre = left + (block + 0.5) * pitch
        odd = any(layer.fallback or layer.rungs for layer in layers)
        name = layers[0].name if len(layers) == 1 else f"block {block}, {len(layers)} layers"
        if values:
            middle = median(values)
            height = axis.place(middle) * (bottom - top)
            tip = f"{name}: {percent(middle, 2)}"
            if len(values) > 1:
                tip += f" (median; {percent(values[0], 2)} to {percent(values[-1], 2)})"
            measured.append((middle, name))
            css = "compressed" if not odd else "odd"
            body.append(bar(centre - thick / 2, bottom - height, thick, height, css, tip))
            if len(values) > 1:
                ends = [bottom - axis.place(end) * (bottom - top) for end in (values[0], values[-1])]
                body.append(line(centre, ends[0], centre, ends[1], "whisker"))
        if odd:
            body.append(f'<path d="M{centre:.1f} {top - 1:.1f}l-4 -7h8z" class="mark"/>')
    body.append(line(left, bottom, width, bottom, "axis"))
    for block in sorted({0, blocks // 2, blocks - 1}):
        body.append(text(left + (block + 0.5) * pitch, bottom + 13, str(block), "tick", "middle"))
    if measured:
        worst, where = max(measured)
        description = (
            f"{len(measured)} blocks; median {percent(median(v for v, _ in measured), 2)}, "
            f"greatest {percent(worst, 2)} in {where}"
        )
    else:
        description = "not measured"
    return picture(width, 110, title, description, body, key)
