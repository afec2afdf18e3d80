"""What the answers to a task say: the score, how sure it is, what guessing gives, and whether the base was better.

Two models that were asked the same questions are compared question by question: most of the spread of a score comes
from which questions were drawn, and that is the same for both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import comb, erfc, fsum, isfinite, sqrt
from typing import Any

from compressor.report.numbers import MINUS, significant
from compressor.report.schema_use import TaskResult

GUESSABLE = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info"}
"""Metrics of a multiple-choice task that a guess scores 1 / choices in."""

SURE = 0.05
"""A difference is called one where chance alone would make it, or a larger one, less often than this."""


ALIKE = "its tasks count alike, however many questions they have: no chance, no error"


@dataclass(frozen=True)
class Scores:
    """One metric of one task, question by question.

    Attributes:
        value: of the whole task, as the harness gives it.
        each: of every question, where ``value`` is their mean; else empty.
        chances: of every question, what a guess scores; empty where nothing can be guessed.
        questions: SHA-256 of what was asked and what was expected.
        shots: examples before each question; None where the tasks of a group differ in it.
        members: of a group, the tasks that its value is made of.
        note: what has to be said of it, whatever the figures are.
    """

    task: str
    metric: str
    value: float
    each: list[float]
    chances: list[float]
    samples: int
    total: int | None
    shots: int | None
    output_type: str
    questions: str
    higher_is_better: bool = True
    members: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean; None where the value is none."""
        return standard_error(self.each)

    @property
    def chance(self) -> float | None:
        """What guessing gives on these questions."""
        return fsum(self.chances) / len(self.chances) if self.chances else None

    @property
    def guessed(self) -> bool:
        """Whether guessing may have given this score: it is at most two standard errors above chance."""
        return self.chance is not None and self.stderr is not None and self.value - self.chance <= 2 * self.stderr


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of ``values``, from their spread (divided by n - 1); None for fewer than two."""
    if len(values) < 2:
        return None
    mean = fsum(values) / len(values)
    return sqrt(fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


@dataclass(frozen=True)
class Paired:
    """The difference of two models over the same questions.

    Attributes:
        difference: mean of ours - the base's.
        stderr: its standard error.
        won: questions that were answered better than by the base; ``lost``: worse.
        p: how often chance alone makes a difference as large as this.
    """

    difference: float
    stderr: float
    won: int
    lost: int
    p: float


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """Compare answers question by question.

    Where a question is either right or wrong, ``p`` is McNemar's exact test: of the questions that only one model has
    right, as many should fall to either. Otherwise it is the two-sided normal approximation.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    won, lost = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    mean = fsum(differences) / len(differences)
    error = standard_error(differences) or 0.0
    if {*ours, *theirs} <= {0.0, 1.0}:
        p = binomial_two_sided(won, lost)
    else:
        p = 1.0 if won == lost == 0 else erfc(abs(mean) / error / sqrt(2)) if error else 0.0
    return Paired(mean, error, won, lost, p)


def binomial_two_sided(won: int, lost: int) -> float:
    """How often ``won + lost`` tosses of a coin fall as unevenly as this, or more so."""
    tosses, fewer = won + lost, min(won, lost)
    if won == lost:
        return 1.0
    return float(min(1.0, 2 * sum(comb(tosses, heads) for heads in range(fewer + 1)) / 2**tosses))


def result_of(ours: Scores, base: Scores | None, harness: str) -> TaskResult:
    """One line of the report.

    Args:
        base: the same of the model it was made from, asked the same questions.
        harness: version of lm-eval.
    """
    chance = ours.chance
    corrected = (ours.value - chance) / (1 - chance) if chance is not None and chance < 1 else None
    held = paired(ours.each, base.each) if base is not None and ours.each else None
    return TaskResult(
        task=ours.task,
        metric=ours.metric,
        value=ours.value,
        stderr=ours.stderr,
        chance=chance,
        corrected=corrected,
        base=None if base is None else base.value,
        difference_stderr=None if held is None else held.stderr,
        p=None if held is None else held.p,
        verdict=verdict(ours, base, held),
        samples=ours.samples,
        total=ours.total,
        shots=ours.shots,
        output_type=ours.output_type,
        members=ours.members,
        harness=harness,
        tokens_sha256=ours.questions,
    )


def verdict(ours: Scores, base: Scores | None, held: Paired | None) -> str:
    """What a score says, in words; empty where there is nothing to add to it."""
    if ours.note:
        return ours.note
    if base is None:
        return "no better than guessing" if ours.guessed else ""
    if base.guessed:
        return "says nothing: the base itself is no better than guessing"
    if held is None:
        return ""
    if base.chance is None and not any(base.each):
        return "says nothing: the base has none right"
    if held.p < SURE:
        better = (held.difference > 0) == ours.higher_is_better
        return f"{'better' if better else 'worse'} than the base, by {points(held)}"
    if not held.won and not held.lost:
        return "every answer as the base's"
    return f"no difference shown: {points(held)}"


def points(held: Paired) -> str:
    """A difference and its standard error in points, such as ``3.5 ± 1.2 points (20 lost, 13 won, p 0.3)``."""
    size, error = 100 * held.difference, 100 * held.stderr
    sign = MINUS if size < 0 else "+"
    return f"{sign}{abs(size):.1f} ± {error:.1f} points ({held.lost} lost, {held.won} won, p {significant(held.p, 2)})"


def scores_of(
    results: dict[str, Any], shots: dict[str, int], types: dict[str, str], members: dict[str, list[str]]
) -> list[Scores]:
    """Take apart what ``lm_eval.evaluator.evaluate`` returns with ``log_samples``.

    Args:
        shots: task -> examples before each question.
        types: task -> the harness's output type.
        members: group -> its tasks.

    Returns:
        The scores of every task; before those of its tasks, the scores of a group that says how they are joined.
    """
    found: dict[str, list[Scores]] = {}
    for task, samples in results["samples"].items():
        questions = fingerprint(samples)
        found[task] = []
        for metric, filtered, value in _metrics(results["results"][task]):
            asked = [sample for sample in samples if sample["filter"] == filtered and metric in sample]
            each = _each([sample[metric] for sample in asked], value)
            found[task].append(
                Scores(
                    task=task,
                    metric=_named(metric, filtered),
                    value=value,
                    each=each,
                    chances=_chances(asked, metric, types[task], results["configs"][task]) if each else [],
                    samples=len(asked),
                    total=results["n-samples"][task]["original"],
                    shots=shots[task],
                    output_type=types[task],
                    questions=questions,
                    higher_is_better=results["higher_is_better"].get(task, {}).get(metric) is not False,
                )
            )
    rows, left = list[Scores](), dict(members)
    for task, scores in found.items():
        for group in [name for name, tasks in left.items() if task in tasks]:
            tasks = left.pop(group)
            for metric, filtered, value in _metrics(results.get("groups", {}).get(group, {})):
                of = [each for name in tasks for each in found[name] if each.metric == _named(metric, filtered)]
                rows.append(joined(group, value, of))
        rows += scores
    return rows


def joined(group: str, value: float, members: Sequence[Scores]) -> Scores:
    """The score of a group. Its questions are those of its tasks together, where ``value`` is their mean.

    Args:
        value: as the harness gives it.
        members: the same metric of its tasks.
    """
    first = members[0]
    means = all(score.each for score in members)
    each = _each([share for score in members for share in score.each], value) if means else []
    guessable = each and all(score.chances for score in members)
    totals = [score.total for score in members]
    return Scores(
        task=group,
        metric=first.metric,
        value=value,
        each=each,
        chances=[share for score in members for share in score.chances] if guessable else [],
        samples=sum(score.samples for score in members),
        total=None if None in totals else sum(total or 0 for total in totals),
        shots=first.shots if len({score.shots for score in members}) == 1 else None,
        output_type="group",
        questions=hashlib.sha256("".join(score.questions for score in members).encode()).hexdigest(),
        higher_is_better=first.higher_is_better,
        members=[score.task for score in members],
        note=ALIKE if means and not each else "",
    )


def _metrics(row: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Metrics, how the answers were filtered for them, and values, among what the harness says of a task or group."""
    for key, value in row.items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            yield metric, filtered, float(value)


def _named(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric} ({filtered})"


def _each(each: Sequence[Any], value: float) -> list[float]:
    """The score of every question, if the task's is their mean."""
    if not each or not all(isinstance(score, (int, float)) and isfinite(score) for score in each):
        return []
    mean = fsum(each) / len(each)
    return [float(score) for score in each] if abs(mean - value) <= 1e-6 * max(1.0, abs(value)) else []


def _chances(samples: list[dict[str, Any]], metric: str, output_type: str, config: dict[str, Any]) -> list[float]:
    """What a guess scores at every question; empty unless the harness itself picks one choice and calls it right."""
    if output_type != "multiple_choice" or metric not in GUESSABLE or config.get("process_results"):
        return []
    chances = []
    for sample in samples:
        unconditional = any(name == "acc_mutual_info" for name in sample["metrics"])  # asked once more, without text
        choices = len(sample["arguments"]) // (2 if unconditional else 1)
        right = len(set(sample["target"])) if isinstance(sample["target"], list) else 1
        chances.append(right / choices)
    return chances


def fingerprint(samples: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of what was asked and what was expected, in the harness's words."""
    digest = hashlib.sha256()
    for sample in samples:
        asked = [sample["arguments"], sample["target"], sample["doc_hash"]]
        digest.update(json.dumps(asked, sort_keys=True, default=str).encode())
    return digest.hexdigest()
