"""Where the names of points go in a drawing: beside their marks, over no other mark or name."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Anchor = Literal["start", "middle", "end"]
Segment = tuple[float, float, float, float]

HEIGHT = 13.0  # of a line of text, drawing units
RISE = 9.5  # of it above the baseline
NARROW, BROAD = frozenset("iljtfrI.,:;|!'()[]/ -"), frozenset("mwMW@%—…")
CROSSED, LEADER_CROSSED = 6.0, 1.0  # cost of a drawn line through a name, through the line from it to its mark
# direction from the mark: x, y (down), anchor
Direction = tuple[float, float, Anchor]
RIGHT: Direction = (1, 0, "start")
LEFT: Direction = (-1, 0, "end")
ABOVE: Direction = (0, -1, "middle")
BELOW: Direction = (0, 1, "middle")
RIGHT_ABOVE: Direction = (0.7, -0.7, "start")
LEFT_BELOW: Direction = (-0.7, 0.7, "end")
LEFT_ABOVE: Direction = (-0.7, -0.7, "end")
RIGHT_BELOW: Direction = (0.7, 0.7, "start")
AROUND: tuple[Direction, ...] = (RIGHT, LEFT, ABOVE, BELOW, RIGHT_ABOVE, LEFT_BELOW, LEFT_ABOVE, RIGHT_BELOW)
OUTSIDE: tuple[Direction, ...] = (LEFT_BELOW, LEFT, BELOW, RIGHT_ABOVE, RIGHT, ABOVE, LEFT_ABOVE, RIGHT_BELOW)
"""For marks with nothing to their lower left, as on a frontier."""

DISTANCES = (0.0, 12.0, 24.0, 38.0, 54.0)  # beyond the mark's edge; from the second on with a line to the mark


@dataclass(frozen=True)
class Box:
    """A rectangle; y points down."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap; touching edges do not."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def within(self, other: Box) -> bool:
        """Whether it lies inside ``other``."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )

    def crossed_by(self, segment: Segment) -> bool:
        """Whether a straight line runs through it (clipping of Liang and Barsky)."""
        x1, y1, x2, y2 = segment
        enter, leave = 0.0, 1.0
        for start, step, low, high in ((x1, x2 - x1, self.left, self.right), (y1, y2 - y1, self.top, self.bottom)):
            if step == 0:
                if not low < start < high:
                    return False
                continue
            first, last = sorted(((low - start) / step, (high - start) / step))
            enter, leave = max(enter, first), min(leave, last)
        return enter < leave


@dataclass(frozen=True)
class Mark:
    """A point to be named.

    Attributes:
        radius: half its width.
        texts: what to call it, the best first.
        directions: where to put that, the best first.
        reach: how far off its name may stand; see ``DISTANCES``.
    """

    x: float
    y: float
    radius: float
    texts: tuple[str, ...] = ()
    directions: tuple[Direction, ...] = AROUND
    reach: float = DISTANCES[-1]

    @property
    def box(self) -> Box:
        """What it covers."""
        return Box(self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)


@dataclass(frozen=True)
class Label:
    """A text at (x, baseline y), and the line to its mark where it stands off."""

    text: str
    x: float
    y: float
    anchor: Anchor
    leader: Segment | None
    box: Box


def text_width(words: str, size: float = 11.0) -> float:
    """Width in a broad and bold sans-serif font, rather too much than too little: the reader's font is not known."""
    em = sum(0.43 if char in NARROW else 1.05 if char in BROAD or ord(char) > 0x2E80 else 0.7 for char in words)
    return em * size


def shortened(names: Sequence[str], limit: int) -> list[str]:
    """Names of at most ``limit`` characters: a common beginning goes first, and then the middle."""
    if all(len(name) <= limit for name in names):
        return list(names)
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    shared = "".join(column[0] for column in alike) if len(names) > 1 else ""
    shared = shared[: 1 + max(shared.rfind(char) for char in "-_/. ")]
    rests = [f"…{name.removeprefix(shared)}" if shared else name for name in names]
    return [_without_middle(rest, limit) for rest in rests]


def _without_middle(name: str, limit: int) -> str:
    """The middle gives way, since names mostly differ at their ends."""
    if len(name) <= limit:
        return name
    tail = (limit - 1) * 3 // 5
    return f"{name[: limit - 1 - tail]}…{name[len(name) - tail :]}"


def cross(one: Segment, other: Segment) -> bool:
    """Whether two straight lines cut each other; those that only touch, or lie along each other, do not."""

    def side(line: Segment, x: float, y: float) -> float:
        return (line[2] - line[0]) * (y - line[1]) - (line[3] - line[1]) * (x - line[0])

    apart = side(one, *other[:2]) * side(one, *other[2:]) < 0
    return apart and side(other, *one[:2]) * side(other, *one[2:]) < 0


def place_labels(marks: Sequence[Mark], area: Box, lines: Sequence[Segment]) -> list[Label | None]:
    """Name the marks one after the other, the first ones with the free choice.

    Args:
        marks: all that is drawn; those without texts are only kept clear of.
        area: where texts may stand.
        lines: what texts should not be crossed by; they are where there is no other place.

    Returns:
        For every mark its label, or ``None`` where no text of it has a place.
    """
    placed: list[Label] = []
    result: list[Label | None] = []
    for mark in marks:
        others = [other.box for other in marks if other is not mark]
        label = None
        for words in mark.texts:
            label = _best(mark, words, area, others, placed, lines)
            if label is not None:
                placed.append(label)
                break
        result.append(label)
    return result


def _best(
    mark: Mark, words: str, area: Box, others: Sequence[Box], placed: Sequence[Label], lines: Sequence[Segment]
) -> Label | None:
    best: tuple[float, Label] | None = None
    for distance in DISTANCES:
        if distance > mark.reach:
            break
        for rank, (dx, dy, anchor) in enumerate(mark.directions):
            cost = distance / 8 + rank * 0.1
            if best is not None and cost >= best[0]:
                continue
            label = _label(mark, words, distance, dx, dy, anchor)
            if not _free(label, area, others, placed):
                continue
            cost += CROSSED * sum(label.box.crossed_by(line) for line in lines)
            if label.leader:
                cost += LEADER_CROSSED * sum(cross(label.leader, line) for line in lines)
            if best is None or cost < best[0]:
                best = (cost, label)
    return best[1] if best else None


def _label(mark: Mark, words: str, distance: float, dx: float, dy: float, anchor: Anchor) -> Label:
    reach = mark.radius + 3 + distance
    x, middle = mark.x + dx * reach, mark.y + dy * (reach + (HEIGHT / 2 if dx == 0 else HEIGHT / 4))
    width = text_width(words)
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    box = Box(left, middle - HEIGHT / 2, left + width, middle + HEIGHT / 2)
    leader = None
    if distance:
        edge = mark.radius + 1
        end_y = middle - dy * HEIGHT / 2 if dx == 0 else middle
        leader = (mark.x + dx * edge, mark.y + dy * edge, x - (2 * dx if dx else 0), end_y)
    return Label(words, x, box.top + RISE, anchor, leader, box)


def _free(label: Label, area: Box, others: Sequence[Box], placed: Sequence[Label]) -> bool:
    if not label.box.within(area) or any(label.box.meets(box) for box in others):
        return False
    for other in placed:
        if label.box.meets(other.box) or (other.leader and label.box.crossed_by(other.leader)):
            return False
    leader = label.leader
    if leader is None:
        return True
    if any(box.crossed_by(leader) for box in (*others, *(other.box for other in placed))):
        return False
    return not any(other.leader and cross(leader, other.leader) for other in placed)
