"""compare --plot: the frontier, the drawing, the page, and what the option refuses."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from test_report_html import HOSTILE, parse
from typer.testing import CliRunner

from compressor.cli.compare import compare
from compressor.errors import UserError
from compressor.report.compare_page import check_target, render_page, summary, write_page
from compressor.report.comparison import Entry, Group, compare_texts, read_entries
from compressor.report.files import write_report
from compressor.report.numbers import tick_bytes
from compressor.report.pareto import Point, dominates, points_of
from compressor.report.plot_axes import span_axis
from compressor.report.plot_labels import AROUND, OUTSIDE, Box, Mark, cross, place_labels, shortened, text_width
from compressor.report.plot_pareto import BROAD, SLIM, cap_of, pareto_plot
from compressor.report.schema import Report

Make = Callable[..., Report]
Measured = tuple[list[Entry], list[Group]]


def point(label: str, count: int, perplexity: float, **more: object) -> Point:
    values = {"who": "compressed", "number": 1, "bits_linears": 4.0, "bits_model": 5.0, "reference": 10.0, "kl": 0.1}
    return Point(label=label, bytes=count, perplexity=perplexity, **{**values, **more})  # type: ignore[arg-type]


def measured(
    tmp_path: Path,
    make_report: Make,
    models: dict[str, tuple[int, float]],
    change: Callable[[str, Report], None] | None = None,
) -> Measured:
    """Models of the given bytes and perplexities, as folders with nothing but a report."""
    folders = []
    for name, (count, perplexity) in models.items():
        report = make_report(blocks=1)
        report.size.output_bytes = report.size.disk_bytes = count
        report.evaluation[0].rows[1].perplexity = perplexity
        if change:
            change(name, report)
        folder = tmp_path / name
        folder.mkdir()
        write_report(report, folder)
        folders.append(folder / "report.json")
    entries = read_entries(folders)
    return entries, compare_texts(entries)


def many(count: int, seed: int = 0) -> list[Point]:
    """Random points with a few ties."""
    draw = random.Random(seed)
    return [
        point(f"a model with the name {i}", draw.randint(1, 30) * 10**8, draw.randint(1, 30) / 3, number=i + 1)
        for i in range(count)
    ]


def test_dominance() -> None:
    one = point("one", 10, 5.0)
    assert dominates(one, point("larger", 11, 5.0))
    assert dominates(one, point("worse", 10, 5.1))
    assert not dominates(one, point("equal", 10, 5.0))
    assert not dominates(one, point("smaller", 9, 9.0))
    assert not dominates(one, point("better", 99, 4.0))
    for bad in (math.inf, math.nan):
        assert dominates(one, point("broken", 10, bad))
        assert not dominates(one, point("small and broken", 9, bad))
        assert not dominates(point("broken", 1, bad), one)


def test_points_of_a_group(make_report: Make, tmp_path: Path) -> None:
    """The dense model has the source's bytes and bits, the baseline its accounted ones; they are in order of bytes."""
    entries, groups = measured(
        tmp_path, make_report, {"a": (941_400, 14.1), "b": (800_000, 17.0), "c": (990_000, 14.2)}
    )
    points = points_of(groups[0], entries)
    shown = [(p.number, p.label, p.who, p.bytes, p.perplexity) for p in points]
    rounded = "8-bit round-to-nearest"
    assert shown == [
        (1, "b", "compressed", 800_000, 17.0),
        (1, rounded, "baseline", 930_000, 15.9),
        (2, "a", "compressed", 941_400, 14.1),
        (2, rounded, "baseline", 930_000, 15.9),
        (3, "c", "compressed", 990_000, 14.2),
        (3, rounded, "baseline", 930_000, 15.9),
        (4, "dense: toy", "dense", 1_800_000, 12.3),
    ]
    assert [p.label for p in points if p.frontier] == ["b", "a", "dense: toy"]
    assert points[4].beaten_by == "a"
    assert [p.reference for p in points] == [12.3] * 6 + [None]
    assert (points[-1].bits_linears, points[-1].bits_model) == (16.0, 16.0)
    assert (points[1].bits_linears, points[1].bits_model, points[1].kl) == (8.25, None, 0.2)
    assert all(p.rounding is None for p in points)
    assert summary(points) == "3 of 4 models are on the frontier: b, a and dense: toy."


def test_plain_rounding_that_is_better_is_said_but_is_not_on_the_frontier(make_report: Make, tmp_path: Path) -> None:
    entries, groups = measured(tmp_path, make_report, {"a": (941_400, 15.9), "b": (929_999, 17.0)})
    points = {p.label: p for p in points_of(groups[0], entries) if p.who != "baseline"}
    assert points["a"].frontier and points["a"].rounding == "8-bit round-to-nearest"  # as good, in fewer bytes
    assert points["b"].frontier and points["b"].rounding is None  # smaller than it
    for row in groups[0].lines:
        if row.row.who == "dense":  # beside a dense model 8 bits win or lose by noise
            row.row.perplexity = 16.0
    assert all(p.rounding is None for p in points_of(groups[0], entries) if p.who == "dense")
    page = render_page(entries, groups)
    assert "Plain rounding would have been no larger and no worse" in page
    assert "<p>than a.</p>" in page


@pytest.mark.parametrize("seed", range(20))
def test_the_frontier_is_what_its_definition_says(make_report: Make, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    models = {f"m{i}": (draw.randint(1, 9) * 100_000, float(draw.randint(13, 20))) for i in range(12)}
    models["broken"] = (1, math.inf)
    entries, groups = measured(tmp_path, make_report, models)
    places = {**models, "dense: toy": (1_800_000, 12.3)}
    for p in points_of(groups[0], entries):
        if p.who == "baseline":
            assert not p.frontier
            continue
        size, perplexity = places[p.label]
        better = [
            name
            for name, (b, q) in places.items()
            if math.isfinite(q) and b <= size and q <= perplexity and (b < size or q < perplexity)
        ]
        assert p.frontier == (not better and math.isfinite(perplexity))
        assert (p.beaten_by is None) == (not better)
        assert p.beaten_by is None or p.beaten_by in better


def test_dense_models_of_two_sources(make_report: Make, tmp_path: Path) -> None:
    """A group lists equal dense rows of one source once; every model is still held against its own."""

    def change(name: str, report: Report) -> None:
        if name == "b":
            report.model.source, report.evaluation[0].rows[0].perplexity = "other", 13.0

    entries, groups = measured(tmp_path, make_report, {"a": (1, 14.0), "b": (2, 15.0), "c": (3, 16.0)}, change)
    points = points_of(groups[0], entries)
    assert {p.label: p.reference for p in points if p.who == "compressed"} == {"a": 12.3, "b": 13.0, "c": 12.3}
    assert [p.label for p in points if p.who == "dense"] == ["dense: toy", "dense: other"]


@pytest.mark.parametrize("count", [1, 2, 8, 30, 100])
def test_names_overlap_nothing(count: int) -> None:
    draw = random.Random(count)
    area = Box(0, 0, 800, 400)
    marks = [
        Mark(
            draw.uniform(20, 780), draw.uniform(20, 380), 5, (f"some model, {i}", str(i)), OUTSIDE if i % 2 else AROUND
        )
        for i in range(count)
    ]
    stairs = [(0.0, 200.0, 800.0, 200.0)]
    labels = place_labels(marks, area, stairs)
    placed = [(mark, label) for mark, label in zip(marks, labels, strict=True) if label]
    assert len(placed) > 0.8 * count
    assert sum(label.text.startswith("some") for _, label in placed) >= min(count, 15)
    for (one, a), (two, b) in itertools.combinations(placed, 2):
        assert not a.box.meets(b.box)
        assert not (a.leader and b.box.crossed_by(a.leader)) and not (b.leader and a.box.crossed_by(b.leader))
        assert not (a.leader and b.leader and cross(a.leader, b.leader))
        assert not a.box.meets(two.box) and not b.box.meets(one.box)
    for _, label in placed:
        assert label.box.within(area)
        assert label.box.right - label.box.left == pytest.approx(text_width(label.text))


def test_a_name_goes_where_no_line_is() -> None:
    mark = Mark(400, 200, 5, ("name",))
    free = place_labels([mark], Box(0, 0, 800, 400), [])[0]
    blocked = place_labels([mark], Box(0, 0, 800, 400), [(400.0, 200.0, 800.0, 200.0)])[0]
    assert free and free.anchor == "start" and free.x > 400
    assert blocked and blocked.anchor == "end" and blocked.x < 400
    assert place_labels([mark], Box(395, 195, 405, 205), []) == [None]


def test_lines_and_boxes_against_sampling() -> None:
    draw = random.Random(3)
    hits = 0
    for _ in range(300):
        box = Box(2, 3, 7, 6)
        x1, y1, x2, y2 = (draw.choice([draw.uniform(0, 10), 5.0]) for _ in range(4))
        ways = [(x1 + (x2 - x1) * t / 2000, y1 + (y2 - y1) * t / 2000) for t in range(2001)]
        inside = any(box.left < x < box.right and box.top < y < box.bottom for x, y in ways)
        if inside != box.crossed_by((x1, y1, x2, y2)):  # a corner may be cut between two samples
            assert not inside
            hits += 1
    assert hits <= 3
    assert cross((0, 0, 2, 2), (0, 2, 2, 0))
    assert not cross((0, 0, 2, 2), (3, 0, 3, 9))
    assert not cross((0, 0, 2, 0), (1, 0, 3, 0))


def test_short_names() -> None:
    assert shortened(["a-b", "a-c"], 5) == ["a-b", "a-c"]
    assert shortened(["tiny-llama-gptq", "tiny-llama-rtn"], 10) == ["…gptq", "…rtn"]
    assert shortened(["abcdefghijklmnop"], 8) == ["abc…mnop"]
    assert shortened(["abcdefgh", "abcdefghijk"], 8) == ["abcdefgh", "abc…hijk"]  # no word ends where they part


@pytest.mark.parametrize("values", [[3.0], [1.0, 4.9], [1.0, 5.1], [1e-3, 1e9], [7.1, 7.2], [0.0, 3.0], [2e9, 2e9]])
def test_axes(values: list[float]) -> None:
    axis, logarithmic = span_axis(values, str, 6)
    assert logarithmic == (values[0] > 0 and values[-1] / values[0] > 5)
    places = [axis.place(value) for value in values]
    assert places == sorted(places)
    assert all(0 <= place <= 1 for place in places)
    ticks = [tick for tick, _ in axis.ticks]
    assert 2 <= len(ticks) <= 9 and ticks == sorted(set(ticks))
    assert all(-1e-9 <= axis.place(tick) <= 1 + 1e-9 for tick in ticks)


def test_ticks_of_bytes_keep_what_tells_them_apart() -> None:
    assert [tick_bytes(count).replace("\u00a0", " ") for count in (0, 950, 1_225_000, 2e9, 999_999_999.9)] == [
        "0 B",
        "950 B",
        "1.225 MB",
        "2 GB",
        "1 GB",
    ]


def test_a_collapsed_model_does_not_flatten_the_others() -> None:
    good = [point(f"m{i}", i + 1, 10.0 - i, number=i + 1) for i in range(3)]
    drawn = pareto_plot([*good, point("bad", 4, 1e9, number=4)], "text", BROAD, "k")
    assert drawn is not None and "off scale" in drawn and "logarithmic" not in drawn.split("bytes of")[0]
    plain = pareto_plot(good, "text", BROAD, "k")
    assert plain is not None and "off scale" not in plain
    assert cap_of([1.0, 100.0, 200.0]) == 200  # where most are bad, half of them still stand on the scale
    wide = pareto_plot([*good, point("mediocre", 4, 100.0, number=4)], "text", BROAD, "k")
    assert wide is not None and "perplexity, logarithmic" in wide and "off scale" not in wide
    assert pareto_plot([point("bad", 4, math.inf)], "text", BROAD, "k") is None


@pytest.mark.parametrize("count", [1, 2, 8, 30])
@pytest.mark.parametrize("size", [BROAD, SLIM])
def test_every_point_has_a_tooltip_and_lies_in_the_drawing(count: int, size: object) -> None:
    points = many(count)
    drawn = pareto_plot(points, "text", size, "k")  # type: ignore[arg-type]
    assert drawn is not None
    parse(drawn)
    for p in points:
        assert f"<g><title>{p.number}. {p.label}\n" in drawn
    for x, y in re.findall(r'c?x="([-\d.]+)" c?y="([-\d.]+)"', drawn):
        assert 0 <= float(x) <= size.width and 0 <= float(y) <= size.height  # type: ignore[attr-defined]
    assert "nan" not in drawn


def test_when_crowded_only_the_frontier_goes_by_name() -> None:
    points = [point(f"m{i:02}", 100 + i, 50.0 - i, number=i + 1, frontier=True) for i in range(5)]
    points += [point(f"w{i:02}", 200 + 7 * i, 60.0 + (i * 7) % 13, number=i + 6) for i in range(20)]
    drawn = pareto_plot(points, "text", BROAD, "k")
    few = pareto_plot(points[:10], "text", BROAD, "k")
    assert drawn is not None and few is not None
    assert len(re.findall(">m0[0-9]</text>", drawn)) >= 4 and not re.findall(">w[0-9]+</text>", drawn)
    assert len(re.findall(">w0[0-9]</text>", few)) >= 4
    assert 'class="name faint"' in drawn and re.search(">[0-9]+</text>", drawn)


def test_page(make_report: Make, tmp_path: Path) -> None:
    entries, groups = measured(
        tmp_path, make_report, {"a": (941_400, 14.1), "b": (800_000, math.inf), "c": (9, math.nan)}
    )
    page = render_page(entries, groups)
    parser = parse(page)
    assert not parser.seen & {"script", "link", "img", "iframe", "object", "embed"}
    for _, name, value in parser.attributes:
        assert not name.startswith("on")
        assert name not in {"href", "src"} or (value or "").startswith("#")
    for word in ("http:", "https:", "url(", "@import"):
        assert word not in page
    ids = [value for _, name, value in parser.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert all('scope="' in cell for cell in re.findall(r"<th\b[^>]*>", page))
    for words in ("not a number", "∞", "941\u00a0kB", "8-bit round-to-nearest", "2 of 4 models are on the frontier"):
        assert words in page, words


def test_other_protocols_stand_in_another_plot(make_report: Make, tmp_path: Path) -> None:
    def change(name: str, report: Report) -> None:
        if name == "b":
            report.evaluation[0].protocol["seqlen"] = 999
        if name == "c":
            report.evaluation = []

    entries, groups = measured(tmp_path, make_report, {"a": (5, 14.0), "b": (6, 15.0), "c": (7, 1.0)}, change)
    page = render_page(entries, groups)
    parts = page.split('<section id="text')[1:]
    assert len(parts) == 2
    for part, own, other in zip(parts, "ab", "ba", strict=True):
        assert f"measured otherwise: {other}<" in part
        rows = re.findall(r"<tr.*?</tr>", part, flags=re.DOTALL)
        assert any(f"</svg>{own}</th>" in row for row in rows)
        assert not any(f"</svg>{other}</th>" in row for row in rows)
        assert "seqlen 256 / 999" in part or "seqlen 999 / 256" in part
        assert part.count("<svg viewBox") == 2
    assert "Not measured, and in no plot</h2><p>c." in page


def test_no_finite_perplexity_leaves_the_table(make_report: Make, tmp_path: Path) -> None:
    def change(name: str, report: Report) -> None:
        for row in report.evaluation[0].rows:
            row.perplexity = math.inf

    entries, groups = measured(tmp_path, make_report, {"a": (5, 1.0), "b": (6, 1.0)}, change)
    page = render_page(entries, groups)
    parse(page)
    assert "there is no frontier" in page and "<svg viewBox" not in page and "<table" in page


def test_names_are_text(make_report: Make, tmp_path: Path) -> None:
    def change(name: str, report: Report) -> None:
        report.evaluation[0].name = HOSTILE
        report.model.source = HOSTILE
        assert report.baseline is not None
        report.baseline.label = HOSTILE

    entries, groups = measured(tmp_path, make_report, {"a<b>&": (5, 14.0), "x": (6, 13.0)}, change)
    page = render_page(entries, groups)
    parser = parse(page)
    assert "<script" not in page and "b" not in parser.seen


def test_targets(make_report: Make, tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    for name, words in (
        ("plot.svg", "does not end in .html"),
        ("plot", "does not end in .html"),
        ("folder.html", "is a folder"),
        ("absent/plot.html", "does not exist"),
    ):
        with pytest.raises(UserError, match=f"--plot.*{words}"):
            check_target(tmp_path / name)

    def change(name: str, report: Report) -> None:
        report.evaluation = []

    entries, groups = measured(tmp_path, make_report, {"a": (5, 14.0), "b": (6, 13.0)}, change)
    with pytest.raises(UserError, match=r"--plot.*none of these"):
        write_page(tmp_path / "plot.html", entries, groups)
    assert not (tmp_path / "plot.html").exists()


def test_command(make_report: Make, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(compare)
    measured(tmp_path, make_report, {"a": (5, 14.0), "b": (6, 13.0)})
    page = tmp_path / "plot.html"
    page.write_text("old")
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    shown = CliRunner().invoke(app, [*folders, "--plot", str(page)])
    assert shown.exit_code == 0, shown.output
    assert "plot.html" in shown.output and "frontier" in page.read_text(encoding="utf-8")
    page.unlink()
    shown = CliRunner().invoke(app, [*folders, "--json", "--plot", str(page)])
    assert [model["label"] for model in json.loads(shown.output)["models"]] == ["a", "b"]
    assert page.is_file()
    refused = CliRunner().invoke(app, [str(tmp_path / "absent"), folders[0], "--plot", str(tmp_path / "plot.png")])
    assert isinstance(refused.exception, UserError) and "--plot" in str(refused.exception)  # before anything is read
