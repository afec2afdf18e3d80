"""The geometry of a treemap: rectangles whose areas are as the sizes, none of them longer than it has to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rect:
    """A rectangle; ``x`` and ``y`` are its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    @property
    def area(self) -> float:
        return self.width * self.height

    def inset(self, top: float, side: float) -> Rect:
        """What is left inside of a heading of height ``top`` and a margin ``side``; never less than nothing."""
        width, height = max(0.0, self.width - 2 * side), max(0.0, self.height - top - side)
        return Rect(self.x + side, self.y + top, width, height)


def squarify(sizes: Sequence[float], into: Rect) -> list[Rect]:
    """Fill a rectangle with one rectangle a size, areas in proportion, as square as can be.

    Rows are laid along the shorter side, and one is closed as soon as another member would make its worst rectangle
    longer (Bruls, Huizing, van Wijk: Squarified Treemaps, 2000). Larger ones come first, at the upper left.

    Args:
        sizes: not negative; those of nothing get rectangles without area.

    Returns:
        Rectangles in the order of ``sizes``.
    """
    total = sum(sizes)
    placed = [Rect(into.x, into.y, 0.0, 0.0)] * len(sizes)
    if total <= 0 or into.area <= 0:
        return placed
    order = sorted((i for i, size in enumerate(sizes) if size > 0), key=lambda i: (-sizes[i], i))
    scale, free, first = into.area / total, into, 0
    while first < len(order):
        side, last = min(free.width, free.height), first + 1
        areas = [sizes[order[first]] * scale]
        while last < len(order) and _worst([*areas, sizes[order[last]] * scale], side) <= _worst(areas, side):
            areas.append(sizes[order[last]] * scale)
            last += 1
        row, free = _row(areas, free, ends=last == len(order))
        for i, rect in zip(order[first:last], row, strict=True):
            placed[i] = rect
        first = last
    return placed


def _worst(areas: Sequence[float], side: float) -> float:
    """The greatest ratio of sides in a row of rectangles along ``side``."""
    thick = sum(areas) / side
    return max(max(area / thick**2, thick**2 / area) for area in areas)


def _row(areas: Sequence[float], free: Rect, *, ends: bool) -> tuple[list[Rect], Rect]:
    """Lay a row along the shorter side of ``free``; the last row takes what is left, so that rounding leaves no gap."""
    upright = free.width >= free.height
    side = free.height if upright else free.width
    thick = (free.width if upright else free.height) if ends else sum(areas) / side
    row, at = [], 0.0
    for area in areas:
        length = side * area / sum(areas)
        row.append(Rect(free.x, free.y + at, thick, length) if upright else Rect(free.x + at, free.y, length, thick))
        at += length
    if upright:
        return row, Rect(free.x + thick, free.y, free.width - thick, free.height)
    return row, Rect(free.x, free.y + thick, free.width, free.height - thick)


def in_rows(sizes: Sequence[float], into: Rect) -> list[Rect]:
    """Fill a rectangle row by row in the order of ``sizes``, areas in proportion: for things that have an order.

    As many rows as make the rectangles about square; each is as high as what stands in it needs.
    """
    total = sum(sizes)
    if total <= 0 or into.area <= 0:
        return [Rect(into.x, into.y, 0.0, 0.0)] * len(sizes)
    count = len(sizes)
    rows = min(count, max(1, round((count * into.height / into.width) ** 0.5)))
    placed: list[Rect] = []
    y = into.y
    for row in range(rows):
        members = sizes[row * count // rows : (row + 1) * count // rows]
        height = into.height * sum(members) / total
        x = into.x
        for size in members:
            width = into.width * size / sum(members) if sum(members) else 0.0
            placed.append(Rect(x, y, width, height))
            x += width
        y += height
    return placed
