"""The tasks of a recipe as a plan tells them: what is known without the harness and without their questions' data."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from compressor.run.settings import EvaluationSettings
from compressor.run.task_files import TaskFile, answers_of
from compressor.run.task_names import check_tasks


@dataclass(frozen=True)
class ForeseenTask:
    """A task, or the tasks of a file or folder of the harness.

    Attributes:
        name: of the task, file or folder.
        what: what is asked, or where it comes from.
        shots: examples before each question; None: as the task has it.
        limit: questions that are asked, the first ones; None: all.
        total: questions that it has; None: not known before it is loaded.
        requests: answers that each model has to give; None: the same.
        harness: version of lm-eval.
    """

    name: str
    what: str
    shots: int | None
    limit: int | None
    total: int | None
    requests: int | None
    harness: str


def foreseen_tasks(settings: EvaluationSettings) -> tuple[ForeseenTask, ...]:
    """What a recipe will ask. Reads files of questions, and nothing else.

    Raises:
        UserError: as :func:`compressor.run.task_names.check_tasks`.
    """
    if not settings.tasks:
        return ()
    asked, limit, shots, harness = (
        check_tasks(settings.tasks),
        settings.task_limit,
        settings.task_shots,
        version("lm-eval"),
    )
    others = [
        *((path.name, "task of lm-eval in a file") for path in asked.yaml_files),
        *((f"{folder.name}/", "tasks of lm-eval in a folder") for folder in asked.folders),
        *((name, "lm-eval's own, by name") for name in asked.names),
    ]
    return (
        *(_of_file(file, shots or 0, limit, harness) for file in asked.files),
        *(ForeseenTask(name, what, shots, limit, None, None, harness) for name, what in others),
    )


def _of_file(file: TaskFile, shots: int, limit: int | None, harness: str) -> ForeseenTask:
    requests = sum(answers_of(file)[:limit])
    return ForeseenTask(file.name, f"{file.path.name}: {file.kind}", shots, limit, len(file.rows), requests, harness)
