"""One value of every layer as a map: a row for each kind of matrix, a column for each block, shades for values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup, escape

from compressor.report.numbers import NBSP, percent, significant
from compressor.report.plot_labels import text_width
from compressor.report.plots import picture, text
from compressor.report.schema import Layer
from compressor.report.shades import NONE, Scale, even_scale

UNIFORM = {"sparsity": 0.005, "bits": 0.01}  # spread below which a map would show one shade
ROW = 22.0
SMALL = 24.0  # width of a cell from which on its number is printed


@dataclass(frozen=True)
class Quantity:
    """What a map shows.

    Attributes:
        value: of a layer; ``None`` where it has none.
        words: a value in full; ``brief``: in a cell, without its unit.
    """

    key: str
    name: str
    unit: str
    value: Callable[[Layer], float | None]
    words: Callable[[float], str]
    brief: Callable[[float], str]
    logarithmic: bool = False


ERROR = Quantity(
    "error",
    "Relative error of the outputs",
    "%",
    lambda layer: layer.relative_error,
    lambda value: percent(value, 2),
    lambda value: significant(100 * value, 2),
    logarithmic=True,
)
BITS = Quantity(
    "bits",
    "Bits per weight",
    "bits",
    lambda layer: layer.bits_per_weight,
    lambda value: f"{significant(value, 3)}{NBSP}bits",
    lambda value: significant(value, 2),
)
SPARSITY = Quantity(
    "sparsity",
    "Sparsity",
    "% zeros",
    lambda layer: layer.sparsity,
    lambda value: f"{percent(value)} zeros",
    lambda value: f"{100 * value:.0f}",
)


@dataclass(frozen=True)
class HeatMap:
    """One quantity: the drawing in two widths (``None`` where it is the same everywhere), shades, and a sentence."""

    quantity: Quantity
    broad: Markup | None
    slim: Markup | None
    scale: Scale | None
    summary: str
    numbers: bool


def cells(layers: Sequence[Layer], quantity: Quantity) -> dict[str, dict[int, list[float]]]:
    """The values by kind, in order of appearance, and block; several where a block has several of a kind: experts."""
    found: dict[str, dict[int, list[float]]] = {}
    for layer in layers:
        row = found.setdefault(layer.kind, {})
        value = quantity.value(layer)
        if value is not None and not math.isnan(value):
            row.setdefault(layer.block, []).append(value)
    return found


def scale_of(models: Sequence[Sequence[Layer]], quantity: Quantity) -> Scale:
    """One scale for the maps of some models, each given by its layers: by the median of each cell."""
    middles = [
        median(values) for layers in models for row in cells(layers, quantity).values() for values in row.values()
    ]
    return even_scale(middles, quantity.words, logarithmic=quantity.logarithmic)


def heat_map(
    layers: Sequence[Layer], quantity: Quantity, *, scale: Scale | None = None, key: str = ""
) -> HeatMap | None:
    """Draw one quantity; ``None`` where no layer has it.

    Args:
        scale: of the shades, where several maps share one.
        key: added to the names of the drawing, unique in the page.
    """
    rows = cells(layers, quantity)
    values = [value for row in rows.values() for some in row.values() for value in some]
    if not values:
        return None
    low, high = min(values), max(values)
    if scale is None and high - low < UNIFORM.get(quantity.key, 0.0):
        return HeatMap(quantity, None, None, None, f"the same in every layer: {quantity.words(median(values))}", False)
    scale = scale or scale_of([layers], quantity)
    blocks = 1 + max(layer.block for layer in layers)
    least, middle, most = (quantity.words(value) for value in (low, median(values), high))
    words = f"median {middle}, from {least} to {most}" if least != most else f"{middle} in all"
    drawn, printed = [], False
    for name, width, tips in (("b", 960.0, True), ("s", 400.0, False)):
        body, height, numbers = _draw(rows, blocks, quantity, scale, width, tips)
        drawn.append(picture(width, height, f"{quantity.name} by layer", words, body, f"{quantity.key}{key}{name}"))
        printed = printed or numbers
    return HeatMap(quantity, drawn[0], drawn[1], scale, words, printed)


def _draw(
    rows: dict[str, dict[int, list[float]]], blocks: int, quantity: Quantity, scale: Scale, width: float, tips: bool
) -> tuple[list[str], float, bool]:
    """The body of the drawing, its height, and whether its cells carry numbers."""
    names = {kind: _name(kind, 0.22 * width) for kind in rows}
    left = max(text_width(name) for name in names.values()) + 8
    pitch = min(64.0, (width - left) / blocks)
    gap = 1.0 if pitch > 6 else 0.0
    widest = max((text_width(quantity.brief(median(v))) for row in rows.values() for v in row.values()), default=0.0)
    numbers = pitch >= max(SMALL, widest + 3)
    body = []
    for place, (kind, row) in enumerate(rows.items()):
        y = place * ROW
        body.append(text(left - 6, y + 15, names[kind], "label", "end"))
        for block in range(blocks):
            found = row.get(block)
            css = scale.css(median(found)) if found else NONE
            tip = f"<title>{escape(_tip(kind, block, found, quantity))}</title>" if tips else ""
            box = f'x="{left + block * pitch:.1f}" y="{y:.0f}" width="{pitch - gap:.2f}" height="{ROW - 1:.0f}"'
            body.append(f'<rect {box} class="{css}">{tip}</rect>' if tip else f'<rect {box} class="{css}"/>')
            if found and numbers:
                x = left + block * pitch + (pitch - gap) / 2
                body.append(text(x, y + 14.5, quantity.brief(median(found)), f"on-{css} thin", "middle"))
    bottom = len(rows) * ROW
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**6) if step * pitch >= 24)
    for block in range(0, blocks, every):
        body.append(text(left + (block + 0.5) * pitch, bottom + 12, str(block), "tick", "middle"))
    return body, bottom + 16, numbers


def _name(kind: str, room: float) -> str:
    """As much of the end of a dotted path as there is room for."""
    path = kind.split(".")
    longest = [".".join(path[i:]) for i in range(len(path))]
    return next((name for name in longest if text_width(name) <= room), path[-1])


def _tip(kind: str, block: int, values: list[float] | None, quantity: Quantity) -> str:
    if not values:
        return f"{kind}, block {block}: none"
    tip = f"{kind}, block {block}: {quantity.words(median(values))}"
    if len(values) > 1:
        tip += f" (median of {len(values)}; {quantity.words(min(values))} to {quantity.words(max(values))})"
    return tip
