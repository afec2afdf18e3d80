"""The report of a linearized model: verdicts that can go either way, the page, the card."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from linear_sample import sample_linearization, sample_proof, transfer

from compressor.report.card import model_card
from compressor.report.files import read_report, write_report
from compressor.report.html import render_html
from compressor.report.linear_page import layer_lines
from compressor.report.linear_words import (
    beyond,
    cache_words,
    checks,
    failed,
    linear_done,
    memory_verdict,
    reach_words,
    recall_summary,
    recall_verdict,
)
from compressor.report.numbers import NBSP
from compressor.report.plot_lines import Series, decades_axis, even_axis, line_plot, steps_axis
from compressor.report.schema import Report
from compressor.report.schema_linear import Linearization, PositionRow, Positions, Recall, RecallRow, Who
from compressor.report.sentences import headline, what_was_done

Make = Callable[..., Report]


def with_positions(window_alone: float, gain: float, error: float | None) -> Linearization:
    content = sample_linearization()
    assert content.proof is not None
    content.proof.positions = Positions(
        text="t",
        windows=4,
        window=8,
        edges=[8, 16, 31],
        tokens=[32, 32, 60],
        rows=[
            PositionRow(who="teacher", whole=10.0, perplexities=[10.0, 10.0, 10.0]),
            PositionRow(who="student", whole=10.0, perplexities=[10.0, 12.0, 12.0]),
            PositionRow(who="window", whole=10.0, perplexities=[10.0, window_alone, window_alone]),
        ],
        gain=gain,
        gain_stderr=error,
    )
    return content


def test_verdicts_on_the_memory() -> None:
    words, good = memory_verdict(with_positions(15.0, math.log(15 / 12), 0.01))
    assert words.replace(NBSP, " ") == (
        "The memory lowers perplexity beyond the window by 20.0 %: 15.0 without it, 12.0 with it"
    )
    assert good is True
    words, good = memory_verdict(with_positions(10.0, -math.log(1.2), 0.01))
    assert words.replace(NBSP, " ") == (
        "The memory does harm beyond the window: perplexity is 10.0 without it, 12.0 with it"
    )
    assert good is False
    words, good = memory_verdict(with_positions(12.1, 0.008, 0.005))
    assert words.startswith("The memory does nothing that can be measured")
    assert good is None
    words, good = memory_verdict(with_positions(12.1, math.nan, 0.005))
    assert words.endswith("the model is broken")
    assert good is False


def test_verdicts_where_there_is_nothing_to_say() -> None:
    content = with_positions(15.0, 0.2, 0.01)
    assert content.proof is not None
    assert content.proof.positions is not None
    del content.proof.positions.rows[2]
    content.proof.positions.gain = None
    assert memory_verdict(content)[0].startswith("The parts cannot be told apart")
    content.mixer["join"] = "window"
    assert memory_verdict(content) == (
        "There is no memory, the window is all: beyond 8 tokens perplexity is 12.0",
        None,
    )
    content.proof.positions.edges, content.proof.positions.tokens = [8], [32]
    for row in content.proof.positions.rows:
        row.perplexities = row.perplexities[:1]
    assert memory_verdict(content)[0].startswith("No evaluated text is longer than the window")
    content.proof.positions = None
    assert memory_verdict(content) == ("What the memory does was not measured", None)
    content.proof = None
    assert memory_verdict(content) == ("What the memory does was not measured", None)


@pytest.mark.parametrize(
    ("window_alone", "says"),
    [
        (15.0, "that windows alone lose to the teacher, 55 % is regained."),
        (11.0, "nothing is regained."),
        (10.05, "It tells little about a memory."),
        (9.0, "It tells little about a memory."),
        (math.inf, ""),
    ],
)
def test_how_much_there_was_to_gain(window_alone: float, says: str) -> None:
    content = with_positions(window_alone, 0.1, 0.01)
    assert reach_words(content).replace(NBSP, " ").endswith(says)
    assert bool(reach_words(content)) == bool(says)
    content.mixer["join"] = "window"
    assert "What lies beyond the window is worth 0.18 nats" in reach_words(content)
    content.proof = None
    assert reach_words(content) == ""


def test_perplexity_beyond_the_window_weighs_by_predictions() -> None:
    placed = sample_proof().positions
    assert placed is not None
    logs = [math.log(4.55) * 1024, math.log(4.44) * 2048, math.log(4.51) * 4080]
    assert beyond(placed, "student") == pytest.approx(math.exp(sum(logs) / (1024 + 2048 + 4080)))
    placed.rows[1].perplexities[2] = math.inf
    assert beyond(placed, "student") == math.inf


def recalled(teacher: float, student: float, window: float, loss: float = 1.0, error: float = 0.02) -> Recall:
    gains: dict[Who, float] = {"teacher": teacher, "student": student, "window": window}
    losses: dict[Who, float] = {"teacher": 1.0, "student": loss, "window": 1.5}
    common = {"distance": 128, "windows": 2, "beyond_context": False, "gain_stderr": error, "hits": 0.5, "guessed": 0.1}
    rows = [RecallRow(who=who, gain=gain, loss=losses[who], **common) for who, gain in gains.items()]  # type: ignore[arg-type]
    return Recall(passage="natural text", cue=8, target=8, trials=8, rows=rows)


@pytest.mark.parametrize(
    ("recall", "says"),
    [
        (recalled(0.8, 0.4, 0.0), "50 % of the teacher\u2019s gain, 0 % without the memory"),
        (recalled(0.8, 0.4, 0.39), "50 % of the teacher\u2019s gain: no more than without the memory"),
        (
            recalled(0.8, 1.6, 0.0, loss=4.0),
            "no recall: a greater loss than without the memory",
        ),
        (recalled(0.04, 0.4, 0.0), "the teacher cannot: no conclusion"),
        (recalled(0.3, 0.4, 0.0, error=0.2), "the teacher cannot: no conclusion"),
    ],
)
def test_verdicts_on_recall(recall: Recall, says: str) -> None:
    assert recall_verdict(recall, 128).replace(NBSP, " ") == says
    assert ("nothing can be concluded" in recall_summary(recall)) == ("cannot" in says)
    assert ("nothing at 2 windows" in recall_summary(recall)) == ("no recall" in says)


def test_a_student_without_parts_is_held_against_the_teacher_that_has_not_seen_the_passage() -> None:
    recall = recalled(0.8, 1.6, 0.0, loss=2.0)
    del recall.rows[2]
    assert recall_verdict(recall, 128) == "no recall: a greater loss than the teacher that has not seen it"
    recall.rows[1].loss = 1.7
    assert recall_verdict(recall, 128).replace(NBSP, " ") == "200 % of the teacher\u2019s gain"


def test_checks_say_what_was_compared() -> None:
    proof = sample_proof()
    assert proof.exactness is not None
    found = checks(proof)
    assert [check.passed for check in found] == [True, None, True, True]
    assert "with the same weights" in found[0].what
    proof.exactness = proof.exactness.model_copy(update={"by_construction": False, "passed": None})
    found = checks(proof)
    assert found[0].found == "not exact by construction"
    assert found[1].found == "0.31"
    assert [check.passed for check in found] == [None, None, True, True]
    proof.exactness = proof.exactness.model_copy(update={"by_construction": True, "to_softmax": None})
    assert [check.passed for check in checks(proof)] == [None, True, True]


def test_a_failed_check_is_said_first(make_report: Make) -> None:
    report = make_report(linearized=True)
    assert report.linearization is not None
    assert report.linearization.proof is not None
    assert failed(report.linearization) == []
    assert "does not compute what it should" not in render_html(report)
    assert "Do not use this model" not in model_card(report)
    report.linearization.proof.agreement[1].passed = False
    assert failed(report.linearization) == ["the same, read in chunks of 43 (510 tokens)"]
    page = render_html(report)
    assert page.index("Do not use this model") < page.index("What the memory does") < page.index("Size ledger")
    assert "✗ no" in page
    assert "Do not use this model" in model_card(report)


def test_headline(make_report: Make) -> None:
    report = make_report(linearized=True)
    assert headline(report).replace(NBSP, " ") == (
        "stories perplexity 12.3 \u2192 14.1 (+14.6 %); a token takes 256 of 1,280 bytes of cache; "
        "the memory lowers perplexity beyond the window by 5.9 %"
    )
    assert report.linearization is not None
    assert report.linearization.proof is not None
    assert report.linearization.proof.decode is not None
    report.linearization.proof.decode.student_bytes_per_token = 0.0
    assert cache_words(report.linearization) == f"cache constant, 1.16{NBSP}MB"
    report.evaluation = []
    assert (
        headline(report).replace(NBSP, " ").startswith("stories perplexity 4.50 \u2192 4.64 (+3.1 %); cache constant")
    )
    report.linearization.proof = None
    assert headline(report) == (
        "quality not measured; 4 of 5 layers hold a constant state instead of a growing cache; "
        "what the memory does was not measured"
    )


def test_what_was_done(make_report: Make) -> None:
    report = make_report(linearized=True)
    for layer in report.layers:
        layer.method = "kept"
    assert what_was_done(report) == (
        "attention of 4 of 5 layers linearized by windowed (window 64, sinks 4, features 8), layer 2 keeps softmax; "
        "trained on 32,768 tokens of attention transfer and 500,000 tokens end to end, "
        "100,000 of them in windows of 2,048"
    )
    content = sample_linearization()
    content.kept, content.transfer, content.distillation = [2, 7], [], None
    assert linear_done(content).endswith("layers 2, 7 keep softmax; not trained")
    content.kept = []
    assert "softmax" not in linear_done(content)


def test_the_layers_of_both_kinds_stand_in_order() -> None:
    lines = layer_lines(sample_linearization())
    assert [(line.layer, line.linear, line.transfer is not None) for line in lines] == [
        (0, True, True),
        (1, True, True),
        (2, False, False),
        (3, True, True),
        (4, True, True),
    ]
    assert lines[2].score == pytest.approx(0.02)


def test_round_trip_with_infinities(make_report: Make, tmp_path: Path) -> None:
    report = make_report(linearized=True)
    assert report.linearization is not None
    assert report.linearization.proof is not None
    assert report.linearization.proof.positions is not None
    report.linearization.proof.positions.rows[3].perplexities[1] = math.inf
    report.linearization.transfer[0].before = math.inf
    write_report(report, tmp_path)
    assert read_report(tmp_path) == report


def test_numbers_beyond_all_bounds_are_drawn(make_report: Make) -> None:
    report = make_report(linearized=True)
    content = report.linearization
    assert content is not None
    assert content.proof is not None
    assert content.proof.positions is not None
    assert content.proof.recall is not None
    assert content.distillation is not None
    for row in content.proof.positions.rows:
        row.perplexities = [math.inf, math.nan, 1e30, 0.5]
    for again in content.proof.recall.rows:
        again.gain, again.gain_stderr = math.nan, None
    for point in content.distillation.curve:
        point.kl = math.nan
    for entry in content.transfer:
        entry.before, entry.after = math.inf, math.nan
        entry.curve[0].error = math.inf
    page = render_html(report)
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert not re.search(r'="[^"]*\b(nan|inf)\b', pictures)


def test_parts_that_were_not_measured_leave_no_trace(make_report: Make) -> None:
    report = make_report(linearized=True)
    content = report.linearization
    assert content is not None
    assert content.proof is not None
    content.selection, content.transfer, content.distillation = None, [], None
    content.proof.positions, content.proof.recall, content.proof.decode, content.proof.samples = None, None, None, []
    page = render_html(report)
    for words in ("Perplexity by position", "Recall beyond", "Decoding", "Samples, continued", "End to end"):
        assert words not in page
    assert "Checks" in page
    content.proof = None
    assert "verification table was switched off" in render_html(report)
    assert "What the memory does was not measured" in model_card(report)


def test_plain_rounding_is_no_yardstick_of_attention(make_report: Make) -> None:
    report = make_report(linearized=True)
    report.baseline = None
    assert "No baseline was evaluated" not in render_html(report)
    report.linearization = None
    page = render_html(report)
    assert "No baseline was evaluated" in page
    assert "attention" not in page.lower()


def test_card(make_report: Make) -> None:
    report = make_report(linearized=True)
    for layer in report.layers:
        layer.format, layer.method = "float32", "kept"
    card = model_card(report)
    assert "# toy, linearized" in card
    assert "an attention that" not in card
    assert "The attention is one that transformers does not know" in card
    assert "prune --save dense" not in card
    assert re.search(r"^- linear-attention$", card, flags=re.MULTILINE)
    assert "| linearized | 5.890 | 4.550 | 4.440 | 4.510 |" in card
    widths = {line.count("|") for line in card.splitlines() if line.startswith(("| linearized", "| |1", "| | 1"))}
    assert widths == {6}
    assert report.linearization is not None
    report.linearization.own_code = False
    stock = model_card(report)
    assert "trust_remote_code" not in stock
    assert "no smaller than the source" not in stock


def test_axes() -> None:
    axis = even_axis([-0.2, 0.9, math.inf], str)
    assert axis.place(0.9) <= 1
    assert 0 <= axis.place(-0.2) < axis.place(0.0) < axis.place(0.9)
    assert 0.0 in [tick for tick, _ in axis.ticks]
    tight = even_axis([1.5, 1.9], str, zero=False)
    assert tight.place(1.5) >= 0
    assert tight.place(1.9) - tight.place(1.5) > 0.5
    decades = decades_axis([0.01, 3.0, 0.0, math.nan], str)
    assert 0 < decades.place(0.01) < decades.place(3.0) < 1
    assert decades.place(0.0) == 0
    steps = [steps_axis([256, 1024, 4096], str).place(value) for value in (256, 1024, 4096)]
    assert steps[1] - steps[0] == pytest.approx(steps[2] - steps[1])
    assert steps_axis([7], str).place(7) == 0.5
    assert even_axis([], str).ticks
    assert decades_axis([], str).ticks


def test_lines_have_gaps_and_long_ones_are_thinned() -> None:
    axis = even_axis([0, 1000], str)

    def drawn(points: list[tuple[float, float, float | None]]) -> str:
        lines = [Series("s", "dense", points)]
        return str(line_plot(lines, axis, axis, title="t", x_name="x", y_name="y", key="k", words=str))

    path = re.search(r'<path d="([^"]*)"', drawn([(0, 1, None), (1, 2, None), (2, math.nan, None), (3, 1, None)]))
    assert path is not None
    assert [step[0] for step in re.findall(r"[ML][^ML]*", path.group(1))] == ["M", "L", "M"]
    many = re.search(r'<path d="([^"]*)"', drawn([(float(i), float(i), None) for i in range(1000)]))
    assert many is not None
    assert 100 < many.group(1).count("L") < 200
    assert "L351.69 24.15" in many.group(1), "the last point is drawn"
    assert "<path" not in drawn([])


def test_a_hundred_layers(make_report: Make) -> None:
    report = make_report(linearized=True)
    assert report.linearization is not None
    report.linearization.linearized = list(range(100))
    report.linearization.kept = []
    report.linearization.transfer = [transfer(layer, 30) for layer in range(100)]
    page = render_html(report)
    assert len(page) < 1_500_000
    assert page.count("linearized</td>") == 100


def test_a_model_without_a_window_is_not_told_of_one(make_report: Make) -> None:
    """Neither in what stands on the page nor in the drawings: layers of stock transformers have a state only."""
    content = make_report(linearized=True).model_dump()
    own = render_html(Report.model_validate(content))
    assert "beyond the window" in own and "Recall beyond the window" in own and "distance in windows" in own
    linear = content["linearization"]
    linear["own_code"], linear["mixer"] = False, {"layer": "Mamba-2", "heads": 4, "state": 64}
    placed, again = linear["proof"]["positions"], linear["proof"]["recall"]
    placed |= {"gain": None, "gain_stderr": None}
    linear["proof"]["exactness"] |= {"by_construction": False, "to_softmax": None}
    for part in (placed, again):
        part["rows"] = [row for row in part["rows"] if row["who"] in ("teacher", "student")]
    page = render_html(Report.model_validate(content))
    held = page[page.index('id="attention"') : page.index('id="layers"')]
    assert "There is no window, the state is all" in page
    for words in ("the window", "distance in windows", "at 2 windows", "Parts are switched off", "windows alone"):
        assert words not in held, words
    unit = again["rows"][0]["distance"] // int(again["rows"][0]["windows"])
    assert f"distance, times {unit} tokens" in page and f"beyond {placed['window']} tokens" in page
