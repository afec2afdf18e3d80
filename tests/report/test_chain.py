"""The chain of runs: what stands beside what, and what is said where nothing may."""

from __future__ import annotations

import math
from collections.abc import Callable

from compressor.report.chain import chain_of, summary_of
from compressor.report.html import render_html
from compressor.report.numbers import ABSENT
from compressor.report.plot_chain import chain_plots
from compressor.report.schema import Evaluation, EvaluationRow, Report
from compressor.report.schema_use import Exported

Make = Callable[..., Report]


def text(name: str, tokens: str, dense: float, ours: float) -> Evaluation:
    rows = [
        EvaluationRow(who="dense", label="dense", perplexity=dense),
        EvaluationRow(who="compressed", label="ours", perplexity=ours, kl=0.1),
    ]
    return Evaluation(
        name=name, protocol={"seqlen": 64}, tokens_sha256=tokens, windows=4, tokens=252, in_domain=False, rows=rows
    )


def run(make: Make, name: str, before: int, after: int, texts: list[Evaluation], earlier: Report | None) -> Report:
    report = make(2)
    report.model.source = name
    report.size.source_bytes, report.size.output_bytes = before, after
    report.evaluation = texts
    report.history = [*earlier.history, summary_of(earlier)] if earlier is not None else []
    return report


def three(make: Make) -> Report:
    """Run 2 evaluated other tokens than runs 1 and 3."""
    first = run(make, "original", 1000, 700, [text("stories", "aa", 10.0, 11.0)], None)
    second = run(make, "one", 700, 500, [text("stories", "bb", 21.0, 22.0)], first)
    return run(make, "two", 500, 300, [text("stories", "aa", 12.0, 13.0)], second)


def test_an_original_has_no_chain(make_report: Make) -> None:
    report = make_report()
    report.history = []
    assert chain_of(report) is None
    report.stages = []
    assert 'id="chain"' not in render_html(report)


def test_every_model_of_the_chain_stands_on_its_own_tokens(make_report: Make) -> None:
    chain = chain_of(three(make_report))
    assert chain is not None
    assert [(link.number, link.name, link.bytes) for link in chain.links] == [
        (0, "original", 1000),
        (1, "one", 700),
        (2, "two", 500),
        (3, "this model", 300),
    ]
    assert chain.told == ["stories (4 windows, tokens aa)", "stories (4 windows, tokens bb)"]
    first, second = (
        [None if link.scores[i] is None else link.scores[i].row.perplexity for link in chain.links] for i in (0, 1)
    )
    assert first == [10.0, 11.0, 12.0, 13.0]  # the output of run 2 by run 3, as its source
    assert second == [None, 21.0, 22.0, None]
    again = [link.scores[0].again for link in chain.links if link.scores[0] is not None]
    assert again == [False, False, True, False]
    assert "30.0\u00a0% of the bytes of original" in chain.summary
    assert "10.0\u00a0\u2192\u00a013.0 (+30.0\u00a0%)" in chain.summary


def test_what_only_one_model_was_measured_on_is_said(make_report: Make) -> None:
    first = run(make_report, "original", 1000, 700, [], None)
    last = run(make_report, "one", 700, 500, [], first)
    last.history[0].evaluation = [text("tales", "cc", 5.0, 6.0)]
    chain = chain_of(last)
    assert chain is not None and chain.alone == []
    chain.links[1].scores[0] = None
    assert chain.alone == ["tales"]
    assert "no text was measured on both" in chain.summary


def test_summary_keeps_no_baseline_and_names_the_stages(make_report: Make) -> None:
    summary = summary_of(make_report())
    assert summary.label == "sparsegpt 50 % + rtn 4 bits"
    assert {row.who for entry in summary.evaluation for row in entry.rows} == {"dense", "compressed"}
    assert summary.baseline == "Better than."


def test_an_export_is_as_large_as_it_lies_there(make_report: Make) -> None:
    """Of a report that does not say how many bits it has, none are made up."""
    summary = summary_of(make_report(exported=True))
    assert (summary.output_bytes, summary.bits_per_weight_linears, summary.bits_per_weight_model) == (345_678, 4.5, 5.1)
    assert summary.label == "sparsegpt 50 % + rtn 4 bits; exported as gguf Q4_0"
    older = make_report()
    older.exported = Exported(form="dense", file_bytes=1_900_000, exact=True)
    second = run(make_report, "plain", 1_900_000, 500_000, [], older)
    page = render_html(second)
    assert "1.80\u00a0MB → 1.90\u00a0MB" in page and f"{ABSENT} in linears, {ABSENT} in the model" in page
    chain = chain_of(second)
    assert chain is not None
    assert [(link.bytes, link.bits_linears) for link in chain.links[-2:]] == [(1_900_000, None), (500_000, 9.0)]


def test_the_plot_shows_every_step(make_report: Make) -> None:
    chain = chain_of(three(make_report))
    assert chain is not None
    drawn = chain_plots(chain)
    assert drawn is not None
    for picture in drawn:
        assert picture.count("<circle") == 4
        assert picture.count('class="step"') == 2 * 3
    for link in chain.links[1:]:
        score = link.scores[0]
        assert score is not None
        score.row.perplexity = math.inf
    assert chain_plots(chain) is None
