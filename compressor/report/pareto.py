"""Bytes against perplexity: the points of one text, and which of them no other beats in both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from compressor.report.comparison import Entry, Group, Line
from compressor.report.schema import LINEARS, Report


@dataclass(frozen=True)
class Point:
    """One model on one text.

    Attributes:
        number: place among the models by bytes, from 1 on; a baseline has that of its model.
        bytes: of the weight files; for a baseline accounted.
        reference: perplexity of its dense model on the same tokens, where known.
        frontier: no other model is smaller or equal and as good or better, one of the two strictly. Baselines, and
            what has no finite perplexity, never are.
        beaten_by: a model of the frontier that is; ``None`` for those on it.
        rounding: label of the smallest baseline that is smaller or equal and as good or better, one strictly; of
            compressed models only, since beside a dense one 8 bits win or lose by noise.
    """

    label: str
    who: Literal["dense", "compressed", "baseline"]
    number: int
    bytes: int
    bits_linears: float | None
    bits_model: float | None
    perplexity: float
    reference: float | None
    kl: float | None
    frontier: bool = False
    beaten_by: str | None = None
    rounding: str | None = None


def dominates(one: Point, other: Point) -> bool:
    """Whether ``one`` is smaller or equal and as good or better, one of the two strictly. What is no number loses."""
    if not math.isfinite(one.perplexity):
        return False
    if not math.isfinite(other.perplexity):
        return one.bytes <= other.bytes
    no_worse = one.bytes <= other.bytes and one.perplexity <= other.perplexity
    return no_worse and (one.bytes, one.perplexity) != (other.bytes, other.perplexity)


def points_of(group: Group, entries: Sequence[Entry]) -> list[Point]:
    """The models of a group by bytes, each followed by its baseline where that was measured."""
    by_label = {entry.label: entry for entry in entries}
    references = _references(group, by_label)
    models: list[tuple[Point, str]] = []
    baselines: dict[str, Point] = {}
    for line in group.lines:
        entry = by_label[line.entry]
        if entry.report is None:
            continue
        point = _point(line, entry, entry.report, references.get(line.entry))
        if point is None:
            continue
        if point.who == "baseline":
            baselines[line.entry] = point
        else:
            models.append((point, line.entry))
    models.sort(key=lambda pair: (pair[0].bytes, pair[0].perplexity if math.isfinite(pair[0].perplexity) else math.inf))
    judged = _judged([point for point, _ in models], list(baselines.values()))
    points: list[Point] = []
    for number, (point, (_, name)) in enumerate(zip(judged, models, strict=True), 1):
        points.append(replace(point, number=number))
        if point.who == "compressed" and name in baselines:
            points.append(replace(baselines[name], number=number))
    return points


def _references(group: Group, by_label: dict[str, Entry]) -> dict[str, float]:
    """Perplexity of the dense model of each entry. Equal dense rows of one source stand in a group once only."""
    own = {line.entry: line.row.perplexity for line in group.lines if line.row.who == "dense"}
    of_source: dict[str | None, set[float]] = {}
    for name, perplexity in own.items():
        of_source.setdefault(by_label[name].source, set()).add(perplexity)
    found = {}
    for line in group.lines:
        same = of_source.get(by_label[line.entry].source, set())
        if line.entry in own:
            found[line.entry] = own[line.entry]
        elif len(same) == 1:
            found[line.entry] = next(iter(same))
    return found


def _point(line: Line, entry: Entry, report: Report, reference: float | None) -> Point | None:
    """The point of one measurement, not yet judged; ``None`` for a baseline whose bytes are not known."""
    row, size = line.row, report.size
    label, count, linears, model = line.label, entry.weight_bytes, entry.bits_linears, entry.bits_model
    if row.who == "dense":
        count, linears, model = size.source_bytes, _source_bits(report), size.source_bits_per_weight
        reference = None
    elif row.who == "baseline":
        if report.baseline is None:
            return None
        label = report.baseline.label
        count, linears, model = report.baseline.bytes, report.baseline.bits_per_weight, None
    return Point(label, row.who, 0, count, linears, model, row.perplexity, reference, row.kl)


def _source_bits(report: Report) -> float | None:
    """Bits per weight of the source's decoder linears, where the ledger knows their bytes."""
    rows = [row for row in report.size.ledger if row.group in LINEARS]
    parameters = sum(row.parameters for row in rows)
    known = [row.source_bytes for row in rows if row.source_bytes is not None]
    return 8 * sum(known) / parameters if parameters and len(known) == len(rows) else None


def _judged(models: Iterable[Point], baselines: Sequence[Point]) -> list[Point]:
    models = list(models)
    frontier = [
        point
        for point in models
        if math.isfinite(point.perplexity) and not any(dominates(other, point) for other in models)
    ]
    judged = []
    for point in models:
        above = [other for other in frontier if dominates(other, point)]
        rounded = [other for other in baselines if point.who == "compressed" and dominates(other, point)]
        judged.append(
            replace(
                point,
                frontier=point in frontier,
                beaten_by=min(above, key=lambda other: other.perplexity).label if above else None,
                rounding=min(rounded, key=lambda other: other.bytes).label if rounded else None,
            )
        )
    return judged
