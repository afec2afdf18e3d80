"""The pages of ``compare --plot`` and ``compare --html``: no scripts, nothing loaded from anywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from compressor.errors import UserError
from compressor.report.comparison import Entry, Group, missing_commands
from compressor.report.environment import environment
from compressor.report.pareto import Point, points_of
from compressor.report.plot_heat import BITS, ERROR, SPARSITY, UNIFORM, HeatMap, Quantity, heat_map, scale_of
from compressor.report.plot_pareto import BROAD, SLIM, pareto_plot
from compressor.report.shades import Scale
from compressor.report.side_by_side import (
    by_kind,
    cautions,
    figures,
    group_names,
    quality,
    sample_rows,
    settings_that_differ,
    tasks,
)

NAMED = 5  # models of the frontier that a sentence lists


@dataclass(frozen=True)
class Section:
    """One text of the page: its plot in two widths (``None`` where no perplexity is finite) and its table."""

    title: str
    group: Group
    points: list[Point]
    broad: Markup | None
    slim: Markup | None
    summary: str
    absent: list[str]

    @property
    def beaten(self) -> str:
        """Models that plain rounding beats: by name, or by number where they are many."""
        found = [point for point in self.points if point.rounding]
        if len(found) > NAMED:
            return f"{len(found)} of these: {_listed([str(point.number) for point in found])} in the table"
        return _listed([point.label for point in found]) if found else ""


def check_target(path: Path, flag: str = "--plot") -> None:
    """Refuse a file that could not be written, before anything is read.

    Raises:
        UserError: another suffix than .html, a folder, or one that does not exist or may not be written to.
    """
    if path.suffix.lower() != ".html":
        raise UserError(f"{flag} writes a page: {str(path)!r} does not end in .html", fix="name it FILE.html")
    if path.is_dir():
        raise UserError(f"{flag}: {str(path)!r} is a folder", fix="name a file ending in .html")
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"{flag}: the folder {str(folder)!r} does not exist", fix="make it, or name another")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{flag}: {str(path)!r} may not be written", fix="name another file")


def write_page(path: Path, entries: Sequence[Entry], groups: Sequence[Group]) -> None:
    """Write the page of plots to ``path``; a file that stands there is replaced.

    Raises:
        UserError: as :func:`check_target`; nothing was measured; or the file system refuses.
    """
    check_target(path)
    if not groups:
        raise UserError("--plot: none of these models has a measurement in its report", fix="leave --plot out")
    _write(path, render_page(entries, groups), "--plot")


def write_side_by_side(path: Path, entries: Sequence[Entry], groups: Sequence[Group]) -> None:
    """Write the page with everything to ``path``; a file that stands there is replaced.

    Raises:
        UserError: as :func:`check_target`; or the file system refuses.
    """
    check_target(path, "--html")
    _write(path, render_side_by_side(entries, groups), "--html")


def _write(path: Path, page: str, flag: str) -> None:
    try:
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{flag}: cannot write {str(path)!r}: {error.strerror}") from error


def render_page(entries: Sequence[Entry], groups: Sequence[Group]) -> str:
    """The whole page as text."""
    sections = _sections(entries, groups)
    texts = list(dict.fromkeys(group.name for group in groups))
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            headline=f"{len(entries)} models: bytes against perplexity on {_listed(texts)}",
            sections=sections,
            unmeasured=[entry.label for entry in entries if not (entry.report and entry.report.evaluation)],
        )
    )


def _sections(entries: Sequence[Entry], groups: Sequence[Group]) -> list[Section]:
    titles = group_names(groups)
    return [_section(group, entries, i, titles[i]) for i, group in enumerate(groups)]


def _section(group: Group, entries: Sequence[Entry], index: int, title: str) -> Section:
    points = points_of(group, entries)
    broad, slim = (pareto_plot(points, group.name, size, f"pareto{index}{size.key}") for size in (BROAD, SLIM))
    here = {line.entry for line in group.lines}
    absent = [entry.label for entry in entries if entry.report and entry.report.evaluation and entry.label not in here]
    return Section(title, group, points, broad, slim, summary(points), absent)


def summary(points: Sequence[Point]) -> str:
    """Who is on the frontier: ``2 of 5 models are on the frontier: ...``."""
    models = [point for point in points if point.who != "baseline"]
    frontier = [point for point in models if point.frontier]
    if not frontier:
        return "No perplexity is finite, so there is no frontier."
    names = f": {_listed([point.label for point in frontier])}" if len(frontier) <= NAMED else ""
    verb = "is" if len(frontier) == 1 else "are"
    return f"{len(frontier)} of {len(models)} models {verb} on the frontier{names}."


def _listed(names: Sequence[str]) -> str:
    """``a``; ``a and b``; ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


@dataclass(frozen=True)
class Maps:
    """One quantity of all runs on one scale; ``None`` where a run has no such value."""

    quantity: Quantity
    scale: Scale
    maps: list[tuple[str, HeatMap | None]]


def render_side_by_side(entries: Sequence[Entry], groups: Sequence[Group]) -> str:
    """The page of ``compare --html`` as text: all runs in one table, the plots, layers, settings and samples."""
    labels = [entry.label for entry in entries]
    page: str = (
        environment()
        .get_template("side.html.j2")
        .render(
            entries=entries,
            labels=labels,
            headline=f"{_listed(labels)} side by side"
            if len(labels) <= NAMED
            else f"{len(labels)} models side by side",
            cautions=cautions(entries),
            figures=figures(entries),
            quality=quality(entries, groups),
            tasks=tasks(entries),
            sections=_sections(entries, groups),
            kinds=by_kind(entries),
            settings=settings_that_differ(entries),
            samples=sample_rows(entries),
            heat=[found for quantity in (ERROR, BITS, SPARSITY) if (found := _maps(entries, quantity)) is not None],
            missing=missing_commands(entries),
            unmeasured=[entry.label for entry in entries if not (entry.report and entry.report.evaluation)],
        )
    )
    return page


def _maps(entries: Sequence[Entry], quantity: Quantity) -> Maps | None:
    """Maps of all runs with one scale for their shades; ``None`` where none has the value, or all have the same."""
    models = [entry.report.layers for entry in entries if entry.report]
    values = [value for layers in models for layer in layers if (value := quantity.value(layer)) is not None]
    if not values or max(values) - min(values) < UNIFORM.get(quantity.key, 0.0):
        return None
    scale = scale_of(models, quantity)
    maps = [
        (entry.label, heat_map(entry.report.layers, quantity, scale=scale, key=str(i)) if entry.report else None)
        for i, entry in enumerate(entries)
    ]
    return Maps(quantity, scale, maps)
