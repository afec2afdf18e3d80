"""Bytes against perplexity as a drawing: marks, the frontier as a staircase, and names where they fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup, escape

from compressor.report.numbers import bytes_text, change, significant, tick_bytes
from compressor.report.pareto import Point
from compressor.report.plot_axes import LOG_BYTES_FROM, span_axis
from compressor.report.plot_labels import DISTANCES, OUTSIDE, Box, Label, Mark, Segment, place_labels, shortened
from compressor.report.plots import line, picture, text

CAP = 30.0  # times the least perplexity; what lies beyond (and beyond twice the median) stands at the upper edge
RADIUS = {"frontier": 5.5, "model": 4.0, "baseline": 4.5}


@dataclass(frozen=True)
class Size:
    """Size of a drawing; with more than ``crowded`` models only those on the frontier go by name, others by number."""

    key: str
    width: float
    height: float
    crowded: int
    letters: int
    ticks: int


BROAD = Size("b", 860, 430, 12, 30, 7)
SLIM = Size("s", 400, 400, 6, 20, 4)


def cap_of(perplexities: Sequence[float]) -> float:
    """The greatest perplexity drawn to scale: a collapsed model must not flatten the differences of all others."""
    return max(CAP * min(perplexities), 2 * median(perplexities))


def tip(point: Point) -> str:
    """All that is known of a point, in lines."""
    bits = [
        f"{significant(value, 3)} {what}"
        for value, what in ((point.bits_linears, "(linears)"), (point.bits_model, "(model)"))
        if value is not None
    ]
    name = (
        f"{point.number}. {point.label}"
        if point.who != "baseline"
        else f"plain rounding, to the bytes of {point.number}: {point.label}"
    )
    quality = f"perplexity {significant(point.perplexity)}"
    if point.reference is not None:
        quality += f", {change(point.perplexity, point.reference)} to dense"
    if point.kl is not None:
        quality += f", KL {significant(point.kl, 3)}"
    lines = [name, bytes_text(point.bytes) + (f", bits per weight {', '.join(bits)}" if bits else ""), quality]
    if point.frontier:
        lines.append("on the frontier")
    elif point.beaten_by:
        lines.append(f"{point.beaten_by} is no larger and no worse")
    if point.rounding:
        lines.append(f"plain rounding is no larger and no worse ({point.rounding})")
    return "\n".join(lines)


def pareto_plot(points: Sequence[Point], name: str, size: Size, key: str) -> Markup | None:
    """Draw the points of one text; ``None`` where no perplexity is finite.

    Args:
        points: as from :func:`compressor.report.pareto.points_of`.
        name: of the text.
        key: unique in the page.
    """
    finite = [point.perplexity for point in points if math.isfinite(point.perplexity)]
    if not finite:
        return None
    cap = cap_of(finite)
    off = any(not point.perplexity <= cap for point in points)
    left, right, top, bottom = 54.0, size.width - 12, 30.0, size.height - 44
    floor = top + (26 if off else 0)  # upper end of the scale
    x_axis, x_log = span_axis([point.bytes for point in points], tick_bytes, size.ticks, LOG_BYTES_FROM)
    y_axis, y_log = span_axis([value for value in finite if value <= cap], lambda tick: f"{tick:,.10g}", 6)

    def place(point: Point) -> tuple[float, float]:
        x = left + x_axis.place(point.bytes) * (right - left)
        if not point.perplexity <= cap:
            return x, top + 12
        return x, bottom - y_axis.place(point.perplexity) * (bottom - floor)

    places = [place(point) for point in points]
    body = [text(4, 14, f"perplexity{', logarithmic' if y_log else ''} (lower is better)", "label")]
    for tick, words in y_axis.ticks:
        y = bottom - y_axis.place(tick) * (bottom - floor)
        body += [line(left, y, right, y, "grid"), text(left - 6, y + 3.5, words, "tick", "end")]
    for tick, words in x_axis.ticks:
        x = left + x_axis.place(tick) * (right - left)
        body += [line(x, top, x, bottom, "grid"), text(x, bottom + 15, words, "tick", "middle")]
    if off:
        body += [
            text(left - 6, top + 15.5, "off scale", "tick", "end"),
            line(left, floor - 2, right, floor - 2, "edge"),
        ]
    body += [line(left, bottom, right, bottom, "axis"), line(left, top, left, bottom, "axis")]
    words = f"bytes of the weight files{', logarithmic' if x_log else ''}"
    body.append(text(right, size.height - 8, words, "label", "end"))

    stairs = _stairs([place for place, point in zip(places, points, strict=True) if point.frontier], top, right)
    body.append(_path(stairs, right, top))
    links = _links(points, places)
    body += [line(*link, "link") for link in links]
    ranks = sorted(range(len(points)), key=lambda i: (points[i].who != "baseline", points[i].frontier))
    body += [_mark(points[i], *places[i]) for i in ranks]
    marks = _named(points, places, size)
    labels = place_labels(marks, Box(left + 3, top + 1, right, bottom - 2), [*stairs, *links])
    frontier = {(place) for place, point in zip(places, points, strict=True) if point.frontier}
    for mark, label in zip(marks, labels, strict=True):
        if label is not None:
            body += _label(label, "name" if (mark.x, mark.y) in frontier else "name faint")
    return picture(size.width, size.height, f"Bytes against perplexity on {name}", _told(points), body, key)


def _stairs(corners: Sequence[tuple[float, float]], top: float, right: float) -> list[Segment]:
    """What the frontier reaches: down at a model, level until the next one that is better."""
    steps: list[Segment] = []
    above = top
    for index, (x, y) in enumerate(corners):
        steps.append((x, above, x, y))
        steps.append((x, y, corners[index + 1][0] if index + 1 < len(corners) else right, y))
        above = y
    return steps


def _path(stairs: Sequence[Segment], right: float, top: float) -> str:
    if not stairs:
        return ""
    start = f"M{stairs[0][0]:.1f} {stairs[0][1]:.1f}"
    points = "".join(f"L{x:.1f} {y:.1f}" for _, _, x, y in stairs)
    return (
        f'<path d="{start}{points}L{right:.1f} {top:.1f}Z" class="beaten"/><path d="{start}{points}" class="stairs"/>'
    )


def _links(points: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[Segment]:
    """From every baseline to its model."""
    return [(*places[i - 1], *places[i]) for i, point in enumerate(points) if point.who == "baseline" and i > 0]


def _mark(point: Point, x: float, y: float) -> str:
    """Circle for a model, square for a dense one, diamond for a baseline; a larger clear disc takes the pointer."""
    r = RADIUS["baseline" if point.who == "baseline" else "frontier" if point.frontier else "model"]
    if point.who == "baseline":
        shape = f'<path d="M{x:.1f} {y - r:.1f}l{r:g} {r:g}l-{r:g} {r:g}l-{r:g} -{r:g}z" class="rounding"/>'
    else:
        css = f"{point.who} model" if point.frontier else f"{point.who} model beaten-model"
        if point.who == "dense":
            r *= 0.9
            shape = f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:.1f}" height="{2 * r:.1f}" class="{css}"/>'
        else:
            shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" class="{css}"/>'
    target = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" class="target"/>'
    return f"<g><title>{escape(tip(point))}</title>{shape}{target}</g>"


def _named(points: Sequence[Point], places: Sequence[tuple[float, float]], size: Size) -> list[Mark]:
    """Marks with the texts they may carry: those of the frontier choose first, baselines carry none."""
    models = [i for i, point in enumerate(points) if point.who != "baseline"]
    names = _names([points[i] for i in models], size.letters)
    text_of = {i: name for i, name in zip(models, names, strict=True) if names.count(name) == 1}
    marks = []
    for i in sorted(range(len(points)), key=lambda i: (not points[i].frontier, points[i].who == "baseline", i)):
        point = points[i]
        if point.who == "baseline":
            marks.append(Mark(*places[i], RADIUS["baseline"]))
        elif point.frontier:
            texts = (text_of[i], str(point.number)) if i in text_of else (str(point.number),)
            marks.append(Mark(*places[i], RADIUS["frontier"], texts, OUTSIDE))
        else:
            by_name = len(models) <= size.crowded and i in text_of
            texts = (text_of[i], str(point.number)) if by_name else (str(point.number),)
            marks.append(Mark(*places[i], RADIUS["model"], texts, reach=DISTANCES[-1 if by_name else 1]))
    return marks


def _names(models: Sequence[Point], letters: int) -> list[str]:
    """Short names; a lone dense model is called just that."""
    dense = [point.label for point in models if point.who == "dense"]
    short = dict(zip(dense, ["dense"] if len(dense) == 1 else shortened(dense, letters), strict=True))
    others = [point.label for point in models if point.who != "dense"]
    short |= zip(others, shortened(others, letters), strict=True)
    return [short[point.label] for point in models]


def _label(label: Label, css: str) -> list[str]:
    parts = [line(*label.leader, "leader")] if label.leader else []
    return [*parts, text(label.x, label.y, label.text, css, label.anchor)]


def _told(points: Sequence[Point]) -> str:
    """The frontier in words, for those who cannot see it."""
    told = [
        f"{point.label}: {bytes_text(point.bytes)}, perplexity {significant(point.perplexity)}"
        for point in points
        if point.frontier
    ]
    models = sum(point.who != "baseline" for point in points)
    return f"{len(told)} of {models} models on the frontier, smallest first. {'; '.join(told)}."
