"""Tasks of EleutherAI's evaluation harness, by a model as we load it, beside the model it was made from."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch

from compressor.engine.checkpoint import resolve_model
from compressor.errors import UserError
from compressor.report.files import read_report, update_report
from compressor.report.schema_use import TaskResult
from compressor.run.progress import Voice, quiet
from compressor.run.task_names import sort_tasks
from compressor.run.task_scores import Scores, result_of
from compressor.run.whole import find_model


@torch.no_grad()
def run_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    against: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch: int = 8,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    voice: Voice | None = None,
) -> list[TaskResult]:
    """Let a model answer tasks; one model is in memory at a time.

    Args:
        tasks: files of questions (``run/task_files.py``), YAML files or folders of the harness, names of its tasks.
        against: the model it was made from, which is asked the same.
        limit: questions of each task, the first ones; all by default.
        shots: examples before each question; by default as the task has it.
        batch: texts computed together.

    Raises:
        UserError: lm-eval is not installed; an unknown model, task, dtype or device; questions that cannot be had.
    """
    voice = voice or quiet()
    if find_spec("lm_eval") is None:
        raise UserError("tasks need EleutherAI's lm-eval", fix='pip install "compressor[tasks]"')
    asked = sort_tasks(tasks)
    models = [find_model(name, trust_remote_code=trust_remote_code) for name in (model, against) if name is not None]
    tokenizers = [found.tokenizer() for found in models]
    from importlib.metadata import version

    from compressor.run.task_harness import ask, load_tasks

    loaded = load_tasks(asked, shots, voice)
    answers: list[list[Scores]] = []
    for found, tokenizer in zip(models, tokenizers, strict=True):
        network = found.load(dtype=dtype, device=device)
        context = found.context
        answers.append(
            ask(loaded, found.name, network, tokenizer, batch=batch, limit=limit, context=context, voice=voice)
        )
        del network
        gc.collect()
    base = {(score.task, score.metric): score for score in answers[1]} if against is not None else {}
    return [
        result_of(score, _same(score, base.get((score.task, score.metric))), version("lm-eval")) for score in answers[0]
    ]


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
        new = {_key(result) for result in results}
        kept = [result for result in report.tasks if _key(result) not in new]
        return update_report(report.model_copy(update={"tasks": [*kept, *results]}), folder)

    return put


def _key(result: TaskResult) -> tuple[str, str, int]:
    return result.task, result.metric, result.shots
