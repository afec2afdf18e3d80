"""Numbers, names and sentences."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.report import numbers
from compressor.report.names import fold_names, natural
from compressor.report.plot_layers import linear_axis, log_axis
from compressor.report.plots import round_ticks
from compressor.report.schema import Evaluation, EvaluationRow, Report
from compressor.report.sentences import (
    classes_told,
    headline,
    judge,
    kernels_told,
    leading_text,
    told_apart,
    what_was_done,
)

Make = Callable[..., Report]


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (12.345, 4, "12.35"),
        (1234.5, 4, "1,234"),
        (0.00123456, 3, "0.00123"),
        (1.5e-9, 2, "1.5e-9"),
        (-2.5, 2, "\u22122.5"),
        (0.0, 4, "0"),
        (3.2e12, 2, "3.2e12"),
        (math.inf, 4, "\u221e"),
        (math.nan, 4, "not a number"),
        (None, 4, "\u2013"),
    ],
)
def test_significant(value: float | None, digits: int, shown: str) -> None:
    assert numbers.significant(value, digits) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (28_400_000, "28.4 MB"), (999_600, "1.00 MB"), (1.02e9, "1.02 GB")],
)
def test_bytes(count: float, shown: str) -> None:
    assert numbers.bytes_text(int(count)).replace(numbers.NBSP, " ") == shown


@given(st.integers(min_value=1000, max_value=10**14))
def test_bytes_are_right_to_three_digits(count: int) -> None:
    amount, unit = numbers.bytes_text(count).split(numbers.NBSP)
    value = float(amount) * {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert abs(value - count) <= 0.0051 * count
    assert len(amount.replace(".", "")) <= 4


def test_small_words() -> None:
    assert numbers.percent(0.523).replace(numbers.NBSP, " ") == "52.3 %"
    assert numbers.percent(0.00001).replace(numbers.NBSP, " ") == "0.0010 %"
    assert numbers.share(0.0002).replace(numbers.NBSP, " ") == "< 0.1 %"
    assert numbers.change(14.1, 12.3).replace(numbers.NBSP, " ") == "+14.6 %"
    assert numbers.change(9.0, 10.0).replace(numbers.NBSP, " ") == "\u221210.0 %"
    assert numbers.change(100.0, 10.0).replace(numbers.NBSP, " ") == "\u00d7 10"
    assert numbers.change(math.inf, 10.0) == numbers.ABSENT
    assert numbers.duration(125).replace(numbers.NBSP, " ") == "2 min 05 s"
    assert numbers.duration(3720).replace(numbers.NBSP, " ") == "1 h 02 min"
    assert numbers.duration(0.42).replace(numbers.NBSP, " ") == "0.42 s"


def test_folding_blocks_and_experts() -> None:
    names = [f"model.layers.{b}.mlp.experts.{e}.up" for b in range(4) for e in range(3)] + ["model.norm"]
    folded = fold_names(names)
    assert [text for text, _ in folded] == ["model.layers.{0..3}.mlp.experts.{0..2}.up", "model.norm"]
    names.remove("model.layers.2.mlp.experts.1.up")
    assert [text for text, _ in fold_names(names)] == [
        "model.layers.{0..1,3}.mlp.experts.{0..2}.up",
        "model.layers.2.mlp.experts.{0,2}.up",
        "model.norm",
    ]


def expand(folded: str) -> list[str]:
    """All names a folded one stands for, by brute force."""
    choices = []
    for piece in re.split(r"(\{[^}]*\})", folded):
        if not piece.startswith("{"):
            choices.append([piece])
            continue
        numbers_of_piece: list[str] = []
        for run in piece[1:-1].split(","):
            low, _, high = run.partition("..")
            numbers_of_piece += [str(number) for number in range(int(low), int(high or low) + 1)]
        choices.append(numbers_of_piece)
    return ["".join(parts) for parts in itertools.product(*choices)]


@given(st.sets(st.tuples(st.sampled_from("ab"), st.integers(0, 5), st.integers(0, 4)), max_size=40))
def test_folding_is_exact(members: set[tuple[str, int, int]]) -> None:
    names = [f"m.{block}.{letter}.{expert}" for letter, block, expert in sorted(members)]
    folded = fold_names(names)
    assert sorted(name for _, members_of in folded for name in members_of) == sorted(names)
    for text, members_of in folded:
        assert sorted(expand(text)) == sorted(members_of)


def test_natural_order() -> None:
    names = ["h.10.a", "h.2.a", "norm", "h.2.b"]
    assert sorted(names, key=natural) == ["h.2.a", "h.2.b", "h.10.a", "norm"]


@given(st.lists(st.floats(min_value=1e-18, max_value=10), min_size=1, max_size=30))
def test_log_axis_holds_all_values_in_order(values: list[float]) -> None:
    axis = log_axis(values)
    places = [axis.place(value) for value in sorted(values)]
    assert all(0 < place <= 1 for place in places)
    assert places == sorted(places)
    assert 2 <= len(axis.ticks) <= 8
    assert axis.place(0.0) == 0.0


@given(st.floats(min_value=1e-6, max_value=1e12))
def test_round_ticks_and_linear_axis(largest: float) -> None:
    ticks = round_ticks(largest)
    assert 2 <= len(ticks) <= 7
    assert 0.5 * largest <= ticks[-1] <= largest * 1.01
    axis = linear_axis(largest)
    assert axis.ticks[-1][0] >= largest * 0.998
    assert axis.place(axis.ticks[-1][0]) == pytest.approx(1)


def evaluation(name: str, compressed: float, baseline: float, *, in_domain: bool = False) -> Evaluation:
    rows = [
        EvaluationRow(who="dense", label="d", perplexity=10.0),
        EvaluationRow(who="compressed", label="c", perplexity=compressed),
        EvaluationRow(who="baseline", label="b", perplexity=baseline),
    ]
    return Evaluation(name=name, protocol={}, windows=1, tokens=1, in_domain=in_domain, rows=rows)


@pytest.mark.parametrize(
    ("pairs", "better", "words"),
    [
        (
            [(11.0, 12.0), (20.0, 21.0)],
            False,
            "Better than plain rounding (8-bit) at the same bytes: t0 11.0 against 12.0",
        ),
        ([(12.0, 11.0), (21.0, 20.0)], True, "would have been better at the same bytes: t0 12.0 against 11.0, t1 21.0"),
        ([(11.0, 12.0), (21.0, 20.0)], None, "better on t0 11.0 against 12.0; worse on t1 21.0 against 20.0"),
        ([(math.nan, 12.0)], True, "would have been better"),
        ([(11.0, 11.0)], None, "As good as plain rounding"),
        ([], None, "was not evaluated"),
    ],
)
def test_verdict(pairs: list[tuple[float, float]], better: bool | None, words: str) -> None:
    texts = [evaluation(f"t{index}", ours, plain) for index, (ours, plain) in enumerate(pairs)]
    verdict = judge(texts, label="8-bit", bits_per_weight=8.0, bytes=1)
    assert verdict.better is better
    assert words in verdict.verdict


def test_luck_with_a_text_does_not_decide() -> None:
    """A perplexity below the dense model's says nothing of what was lost: the divergence does."""
    text = evaluation("t", 9.0, 11.0)
    for row in text.rows:
        row.kl = {"compressed": 0.2, "baseline": 0.001}.get(row.who)
    verdict = judge([text], label="8-bit", bits_per_weight=8.0, bytes=1)
    assert verdict.better is True and "t KL 0.200 against 0.00100" in verdict.verdict
    text.rows[0].perplexity = 8.0
    assert judge([text], label="8-bit", bits_per_weight=8.0, bytes=1).better is False


def test_verdict_says_when_the_bytes_are_not_the_same() -> None:
    texts = [evaluation("t", 11.0, 12.0)]
    said = [
        judge(texts, label="8-bit", bits_per_weight=8.0, bytes=size, compressed_bytes=1_000_000).verdict
        for size in (990_000, 800_000, 1_200_000)
    ]
    assert "at the same bytes" in said[0]
    assert "(8-bit; it has 800 kB, this 1.00 MB)" in said[1].replace(numbers.NBSP, " ")
    assert "(8-bit; it has 1.20 MB, this 1.00 MB)" in said[2].replace(numbers.NBSP, " ")


def test_headline(make_report: Make) -> None:
    assert headline(make_report(exported=True)).startswith("19.2"), "an export has a size of its own"
    report = make_report()
    assert headline(report).replace(numbers.NBSP, " ") == (
        "52.3 % of the bytes; stories perplexity 12.3 \u2192 14.1 (+14.6 %)"
    )
    report.evaluation[0].in_domain = True
    assert headline(report).endswith("(the calibration text: flattering)")
    report.evaluation.append(evaluation("math", 11.0, 12.0))
    assert "math perplexity" in headline(report)
    assert leading_text(report.evaluation) is report.evaluation[1]
    report.evaluation.clear()
    assert headline(report).endswith("quality not measured")


def test_welores_classes(make_report: Make) -> None:
    report = make_report()
    report.layers[0].component = "N-LRC"
    told = "5 linears are low-rank components (LRC), for fine-tuning, 1 is not (N-LRC)"
    assert classes_told(report) == told and told in what_was_done(report)
    for layer in report.layers:
        layer.component = None
    assert classes_told(report) is None


def test_what_was_done(make_report: Make) -> None:
    report = make_report()
    report.layers[1].method = "kept"
    assert (
        what_was_done(report)
        .replace(numbers.NBSP, " ")
        .startswith("5 of 6 linears (246 k weights) by sparsegpt: 52.8 %")
    )
    for stage in report.stages:  # all that were changed went through both
        stage.matrices = 5
    assert " by sparsegpt 50 %, then rtn 4 bits: 52.8" in what_was_done(report).replace(numbers.NBSP, " ")
    for layer in report.layers:
        layer.method = "kept"
    assert what_was_done(report) == "nothing was changed"


def test_what_kernels_cost(make_report: Make) -> None:
    """With perplexities, how many windows, and KL; or why it was not measured; or nothing where nothing is packed."""
    report = make_report(blocks=1)
    assert report.verification is not None
    told = (kernels_told(report) or "").replace(numbers.NBSP, " ")
    assert told == (
        "kernels (avx512, 8-bit activations) instead of exact products: "
        "perplexity 14.08 \u2192 14.13, KL 0.00040 token by token, "
        "0.00030 in prompts (4 windows of 256 tokens of stories); COMPRESSOR_ACTIVATIONS=exact does without"
    )
    assert report.verification.kernels is not None
    report.verification.kernels.activations = "exact"
    assert "COMPRESSOR_ACTIVATIONS" not in (kernels_told(report) or "")
    report.verification.kernels = None
    assert kernels_told(report) == "kernels: what they cost was not measured: they were busy"
    report.verification.kernels_skipped = None
    assert kernels_told(report) is None
    report.verification = None
    assert kernels_told(report) is None


def test_numbers_that_are_held_against_each_other_are_told_apart() -> None:
    assert told_apart(14.12, 15.9) == ("14.1", "15.9")
    assert told_apart(1054.6, 1055.2) == ("1,054.6", "1,055.2"), "both are 1,055 in three or four digits"
    assert told_apart(2.0, 2.0) == ("2.00", "2.00")
    assert told_apart(float("inf"), 3.0) == ("\u221e", "3.00")
