"""Tasks of EleutherAI's evaluation harness, by a model as we load it, beside the model it was made from."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from compressor.engine.checkpoint import resolve_model
from compressor.errors import UserError
from compressor.report.files import read_report, update_report
from compressor.report.schema_use import TaskResult
from compressor.run.progress import Voice, quiet
from compressor.run.task_names import Asked, check_tasks
from compressor.run.task_scores import Scores, result_of
from compressor.run.whole import Found, find_model

if TYPE_CHECKING:
    from compressor.run.task_harness import Questions

BATCH = 8
"""Texts computed together."""


@dataclass(frozen=True)
class Tasks:
    """Tasks that were asked for, their questions loaded.

    Attributes:
        limit: questions of each, the first ones; None: all.
    """

    questions: list[Questions]
    limit: int | None


@dataclass(frozen=True)
class Kept:
    """What was answered before, so that a run that goes on need not ask again: key -> scores as plain data.

    Attributes:
        save: called when something was added.
    """

    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    save: Callable[[], None] = lambda: None


def load_tasks(asked: Asked, *, limit: int | None, shots: int | None, voice: Voice) -> Tasks:
    """Load the questions.

    Args:
        limit: questions of each task, the first ones; None: all.
        shots: examples before each question; None: as the task has it.

    Raises:
        UserError: an unknown task; questions that cannot be had.
    """
    from compressor.run.task_harness import load_questions

    return Tasks(load_questions(asked, shots, limit, voice), limit)


def run_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    against: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch: int = BATCH,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    voice: Voice | None = None,
) -> list[TaskResult]:
    """Let a model answer tasks; one model is in memory at a time.

    Args:
        model: folder, hub id, or ``embedded``.
        tasks: files of questions (``run/task_files.py``), YAML files or folders of the harness, names of its tasks.
        against: the model it was made from, which is asked the same.
        limit: questions of each task, the first ones; all by default.
        shots: examples before each question; by default as the task has it.
        batch: texts computed together.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda, ...
        trust_remote_code: run code that the folder brings along.
        voice: how to speak; by default nothing but warnings, on standard error.

    Returns:
        One for each metric of each task: ``task``, ``metric``, ``value``, ``stderr``, ``chance``, ``base`` ...

    Raises:
        UserError: lm-eval is not installed; an unknown model, task, dtype or device; questions that cannot be had.
    """
    voice = voice or quiet()
    asked = check_tasks(tasks)
    found = [find_model(name, trust_remote_code=trust_remote_code) for name in (model, against) if name is not None]
    loaded = load_tasks(asked, limit=limit, shots=shots, voice=voice)
    return answer(loaded, found, batch=batch, dtype=dtype, device=device, voice=voice)


@torch.no_grad()
def answer(
    tasks: Tasks, models: Sequence[Found], *, dtype: str, device: str, voice: Voice, batch: int = BATCH,
    kept: Kept | None = None,
) -> list[TaskResult]:  # fmt: skip
    """Ask a model, and the one it was made from if there is a second.

    Args:
        kept: answers from before; new ones are added.

    Raises:
        UserError: an unknown dtype or device, a missing tokenizer, or an answer longer than a model's context.
    """
    from compressor.run.task_harness import ask, check_context

    kept = kept or Kept()
    tokenizers = [found.tokenizer() for found in models]
    for found, tokenizer in zip(models, tokenizers, strict=True):
        check_context(tasks.questions, found.name, tokenizer, found.context)
    for place, (found, tokenizer) in enumerate(zip(models, tokenizers, strict=True)):

        def done(questions: Questions, scores: Sequence[Scores], place: int = place) -> None:
            kept.answers[_key(place, questions)] = [asdict(score) for score in scores]
            kept.save()

        missing = [each for each in tasks.questions if _key(place, each) not in kept.answers]
        if not missing:
            continue
        network, limit = found.load(dtype=dtype, device=device), tasks.limit
        ask(
            missing, found.name, network, tokenizer, batch=batch, limit=limit, context=found.context, voice=voice,
            done=done,
        )  # fmt: skip
        del network
        gc.collect()
    told = [
        [Scores(**score) for each in tasks.questions for score in kept.answers[_key(place, each)]]
        for place in range(len(models))
    ]
    base = {(score.task, score.metric): score for score in told[1]} if len(told) > 1 else {}
    return [
        result_of(score, _same(score, base.get((score.task, score.metric))), version("lm-eval")) for score in told[0]
    ]


def _key(place: int, questions: Questions) -> str:
    return f"{'base' if place else 'model'} {questions.digest}"


def _same(ours: Scores, base: Scores | None) -> Scores | None:
    """The base's answers, if it was asked the very same questions."""
    if base is not None and base.questions != ours.questions:
        raise AssertionError(f"{ours.task}: the two models were asked different questions")
    return base


def into_reports(model: str) -> Callable[[Sequence[TaskResult]], list[str]]:
    """Check that the report of a model folder can take task results; return what puts them there.

    Results of the same task, metric and examples are replaced, others stay.

    Returns:
        A function of the results, which returns the names of files that it left as they are.

    Raises:
        UserError: the folder has no report of ours, or cannot be written to.
    """
    folder = resolve_model(model)
    report = read_report(folder)
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}", fix="leave out --into-report")

    def put(results: Sequence[TaskResult]) -> list[str]:
        new = {_row(result) for result in results}
        kept = [result for result in report.tasks if _row(result) not in new]
        return update_report(report.model_copy(update={"tasks": [*kept, *results]}), folder)

    return put


def _row(result: TaskResult) -> tuple[str, str, int | None]:
    return result.task, result.metric, result.shots
