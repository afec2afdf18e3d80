"""compare --html: all figures of all runs, a best only where figures may be compared, and nothing unmarked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from test_report_html import HOSTILE, parse
from typer.testing import CliRunner

from compressor.cli.compare import compare
from compressor.errors import UserError
from compressor.report.compare_page import render_side_by_side
from compressor.report.comparison import Entry, compare_texts, read_entries
from compressor.report.files import write_report
from compressor.report.numbers import ABSENT
from compressor.report.schema import Report
from compressor.report.side_by_side import (
    Row,
    cautions,
    figures,
    group_names,
    quality,
    sample_rows,
    settings_that_differ,
    tasks,
)

Make = Callable[..., Report]


def entries_of(tmp_path: Path, **reports: Report) -> list[Entry]:
    for name, report in reports.items():
        (tmp_path / name).mkdir()
        write_report(report, tmp_path / name)
    return read_entries([tmp_path / name for name in reports])


def named(rows: list[Row], name: str) -> Row:
    (found,) = [row for row in rows if row.name == name]
    return found


def best(row: Row) -> list[bool]:
    return [cell.best for cell in row.cells]


def test_figures_and_their_best(make_report: Make, tmp_path: Path) -> None:
    other = make_report()
    other.size.output_bytes, other.tool.seconds = 700_000, 99.0
    rows = figures(entries_of(tmp_path, a=make_report(), b=other))
    size = named(rows, "weight files")
    assert [cell.words for cell in size.cells] == ["941\u00a0kB", "700\u00a0kB"]
    assert best(size) == [False, True]
    assert size.cells[1].more == "74.4\u00a0% of the first"
    assert not any(best(named(rows, "time of the run")))  # other machines, other loads: no race
    assert not any(best(named(rows, "bits per weight, linears")))  # equal


def test_nothing_is_the_best_among_different_models(make_report: Make, tmp_path: Path) -> None:
    other = make_report()
    other.size.output_bytes, other.history[0].source = 700_000, "another"
    other.model.vocabulary = 99
    entries = entries_of(tmp_path, a=make_report(), b=other)
    assert not any(best(named(figures(entries), "weight files")))
    told = cautions(entries)
    assert told[0] == "made from different models: toy-original, another"
    assert "vocabularies of different sizes (512, 99)" in told[1]


def test_other_tokens_are_other_rows(make_report: Make, tmp_path: Path) -> None:
    one, same, other = make_report(), make_report(), make_report()
    same.evaluation[0].rows[1].perplexity = 13.0
    other.evaluation[0].tokens_sha256, other.evaluation[0].rows[1].perplexity = "cccc3333", 1.0
    entries = entries_of(tmp_path, a=one, b=same, c=other)
    groups = compare_texts(entries)
    names = group_names(groups)
    assert names == ["stories, of 256 tokens, tokens bbbb2222", "stories, of 256 tokens, tokens cccc3333"]
    rows = [row for row in quality(entries, groups) if row.name.startswith("perplexity")]
    assert [[cell.words for cell in row.cells] for row in rows] == [
        ["14.10", "13.00", ABSENT],
        [ABSENT, ABSENT, "1.000"],
    ]
    assert [best(row) for row in rows] == [[False, True, False], [False] * 3]
    assert rows[0].cells[1].more == "+5.7\u00a0% to dense"


def test_divergences_from_different_models_have_no_best(make_report: Make, tmp_path: Path) -> None:
    other = make_report()
    other.evaluation[0].rows[0].perplexity, other.evaluation[0].rows[1].kl = 11.0, 0.01
    entries = entries_of(tmp_path, a=make_report(), b=other)
    rows = quality(entries, compare_texts(entries))
    assert not any(best(named(rows, "KL")))
    assert "against different dense models" in rows[0].note


def test_tasks_stand_together_only_with_the_same_questions(make_report: Make, tmp_path: Path) -> None:
    same, other = make_report(), make_report()
    same.tasks[0].value, other.tasks[0].shots = 0.7, 5
    rows = tasks(entries_of(tmp_path, a=make_report(), b=same, c=other))
    assert [[cell.words for cell in row.cells] for row in rows] == [
        ["0.610", "0.700", ABSENT],
        ["0.410", "0.410", "0.410"],
        [ABSENT, ABSENT, "0.610"],
    ]
    assert best(rows[0]) == [False, True, False]


def test_settings_and_samples(make_report: Make, tmp_path: Path) -> None:
    other = make_report()
    other.recipe = {"stages": [{"prune": {"method": "wanda", "sparsity": 0.5}}]}
    other.samples[0].compressed = "a small house by the river."
    entries = entries_of(tmp_path, a=make_report(), b=other)
    (row,) = settings_that_differ(entries)
    assert (row.name, [cell.words for cell in row.cells]) == ("stages.1.prune.method", ["sparsegpt", "wanda"])
    (sample,) = sample_rows(entries)
    assert [said is not None and said.shared == 1 for said in sample.said] == [False, True]


def test_the_page(make_report: Make, tmp_path: Path) -> None:
    other = make_report(5)
    other.model.source, other.samples[0].prompt, other.recipe = HOSTILE, HOSTILE, {HOSTILE: HOSTILE}
    entries = entries_of(tmp_path, a=make_report(), b=other)
    page = render_side_by_side(entries, compare_texts(entries))
    parser = parse(page)
    assert not parser.seen & {"script", "link", "img", "b"}
    ids = [value for _, name, value in parser.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for _, name, value in parser.attributes if name == "href" and value} <= set(ids)
    for words in ("Before comparing", "Relative error of the outputs", "stages.1.prune.method"):
        assert words in page


def test_a_model_without_a_report(make_report: Make, tmp_path: Path, llama: Path) -> None:
    (tmp_path / "a").mkdir()
    write_report(make_report(), tmp_path / "a")
    entries = read_entries([tmp_path / "a", llama])
    page = render_side_by_side(entries, compare_texts(entries))
    parse(page)
    assert f"{entries[1].label} has no report: only its size is known" in page
    assert "compressor evaluate" in page


def test_command(make_report: Make, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(compare)
    entries_of(tmp_path, a=make_report(), b=make_report())
    folders, page = [str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "both.html"
    shown = CliRunner().invoke(app, [*folders, "--html", str(page), "--plot", str(tmp_path / "plot.html")])
    assert shown.exit_code == 0, shown.output
    assert "side by side" in page.read_text(encoding="utf-8")
    assert "frontier" in (tmp_path / "plot.html").read_text(encoding="utf-8")
    refused = CliRunner().invoke(app, [str(tmp_path / "absent"), folders[0], "--html", str(tmp_path / "page.pdf")])
    with pytest.raises(UserError, match=r"--html.*does not end in \.html"):
        raise refused.exception or AssertionError
