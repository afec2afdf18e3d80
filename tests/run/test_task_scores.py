"""What answers say: standard errors, chance, and two models on the same questions."""

from __future__ import annotations

import random
from itertools import product
from math import comb

import pytest

from compressor.run.task_scores import Scores, binomial_two_sided, paired, result_of, scores_of, standard_error


def scores(each: list[float], chance: float | None = 0.25, *, better: bool = True) -> Scores:
    value = sum(each) / len(each)
    chances = [] if chance is None else [chance] * len(each)
    return Scores(
        "t", "acc", value, each, chances, len(each), len(each), 0, "multiple_choice", "q", higher_is_better=better
    )


def test_standard_error_is_that_of_repeated_samples() -> None:
    draw = random.Random(0)
    means = [sum(draw.random() < 0.3 for _ in range(50)) / 50 for _ in range(4000)]
    spread = (sum((mean - 0.3) ** 2 for mean in means) / len(means)) ** 0.5
    told = standard_error([1.0] * 15 + [0.0] * 35)
    assert told == pytest.approx(spread, rel=0.05)
    assert standard_error([1.0]) is None


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (3, 3), (0, 5), (2, 7), (6, 1)])
def test_a_coin_by_counting_all_its_falls(won: int, lost: int) -> None:
    tosses = won + lost
    uneven = sum(abs(2 * sum(falls) - tosses) >= abs(won - lost) for falls in product((0, 1), repeat=tosses))
    assert binomial_two_sided(won, lost) == pytest.approx(uneven / 2**tosses)
    assert comb(tosses, won) > 0


def test_pairs_tell_what_two_scores_do_not() -> None:
    """99 and 90 of 200: within the spread of each score, but the base has all that we have, and nine more."""
    base = [1.0] * 99 + [0.0] * 101
    ours = [1.0] * 90 + [0.0] * 110
    held = paired(ours, base)
    assert (held.won, held.lost) == (0, 9) and held.p == pytest.approx(2 / 2**9)
    assert held.difference == pytest.approx(-9 / 200) and held.stderr < (standard_error(ours) or 0) / 2
    result = result_of(scores(ours), scores(base), "1")
    assert result.verdict.startswith("worse than the base, by \u22124.5 ± 1.5 points (9 lost, 0 won")
    assert result.difference_stderr == held.stderr and result.p == held.p and result.base == 99 / 200
    assert result.corrected == pytest.approx((0.45 - 0.25) / 0.75)
    shuffled = ours[::-1]
    assert paired(shuffled, base).p == pytest.approx(binomial_two_sided(*_counts(shuffled, base)))


def _counts(ours: list[float], base: list[float]) -> tuple[int, int]:
    pairs = list(zip(ours, base, strict=True))
    return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)


def test_what_is_said() -> None:
    at_chance = scores([1.0] * 26 + [0.0] * 74)
    good = scores([1.0] * 80 + [0.0] * 20)
    near = scores([1.0] * 79 + [0.0] * 21)
    assert result_of(at_chance, None, "1").verdict == "no better than guessing"
    assert result_of(good, None, "1").verdict == ""
    assert result_of(good, at_chance, "1").verdict == "says nothing: the base itself is no better than guessing"
    assert result_of(good, good, "1").verdict == "every answer as the base's"
    assert result_of(near, good, "1").verdict.startswith(
        "no difference shown: \u22121.0 ± 1.0 points (1 lost, 0 won, p 1"
    )
    assert result_of(at_chance, good, "1").verdict.startswith("worse than the base")
    assert result_of(good, scores([0.0] * 100, None), "1").verdict == "says nothing: the base has none right"
    written = result_of(scores([1.0] * 3 + [0.0], None), None, "1")
    assert written.chance is None and written.corrected is None
    lower = result_of(scores([1.5] * 30 + [1.6] * 30, None, better=False), scores([1.0] * 60, None, better=False), "1")
    assert lower.verdict.startswith("worse than the base, by +55.0")


def test_chance_is_of_the_questions_that_were_asked() -> None:
    """Two questions of two choices, one of four with two right ones; a metric that nobody can guess has none."""

    def sample(choices: int, target: object, acc: float) -> dict[str, object]:
        return {
            "filter": "none", "arguments": [("q", "a")] * choices, "target": target, "doc_hash": "h",
            "metrics": ["acc", "f1"], "acc": acc, "f1": (0, 1),
        }  # fmt: skip

    samples = [sample(2, 0, 1.0), sample(2, 1, 0.0), sample(4, [0, 2], 1.0)]
    results = {
        "samples": {"t": samples},
        "results": {"t": {"acc,none": 2 / 3, "acc_stderr,none": "N/A", "f1,none": 0.4, "alias": "t", "sample_len": 3}},
        "n-samples": {"t": {"original": 9, "effective": 3}},
        "configs": {"t": {}},
        "higher_is_better": {"t": {"acc": True}},
    }
    acc, f1 = scores_of(results, {"t": 0}, {"t": "multiple_choice"}, {})
    assert acc.chance == pytest.approx(0.5) and acc.total == 9 and acc.samples == 3
    assert f1.chance is None and f1.stderr is None and f1.each == []
    results["configs"] = {"t": {"process_results": "a function"}}
    assert scores_of(results, {"t": 0}, {"t": "multiple_choice"}, {})[0].chance is None
