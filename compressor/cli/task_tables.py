"""Answers to tasks, as a person reads them in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from compressor.cli.tables import add_row, new_table, say, wide_console
from compressor.report.numbers import ABSENT, percent, significant
from compressor.report.schema_use import TaskResult
from compressor.report.sentences import members_told
from compressor.run.task_plan import ForeseenTask


def print_tasks(results: Sequence[TaskResult]) -> None:
    """Print a table and what it says."""
    console = wide_console()
    asked_both = any(result.base is not None for result in results)
    base = ("base",) if asked_both else ()
    table = new_table("", ("task", "metric"), ("score", "±", *base, "chance", "above it", "asked"))
    for result in results:
        known = result.chance is not None
        add_row(
            table,
            result.task,
            result.metric,
            _score(result, result.value),
            _score(result, result.stderr) if result.stderr is not None else ABSENT,
            *(_score(result, each) for each in ([result.base] if asked_both else [])),
            percent(result.chance) if known else ABSENT,
            percent(result.corrected) if result.corrected is not None else ABSENT,
            f"{result.samples:,}" + (f"/{result.total:,}" if result.total not in (None, result.samples) else ""),
        )
    console.print(table)
    if any(result.chance is not None for result in results):
        say(console, "above it: (score - chance) / (1 - chance); ±: standard error", "dim")
    for group, members in {result.task: result.members for result in results if result.members}.items():
        say(console, f"{group}: {members_told(members)} together", "dim")
    told: dict[str, list[str]] = {}
    for result in results:
        if result.verdict:
            told.setdefault(result.verdict, []).append(f"{result.task} {result.metric}")
    for verdict, names in told.items():
        say(console, f"{', '.join(names)}: {verdict}")


def print_foreseen_tasks(console: Console, tasks: Sequence[ForeseenTask]) -> None:
    """Print what will be asked at the end of a run."""
    title = f"tasks, answered by result and source at the end (lm-eval {tasks[0].harness})"
    table = new_table(title, ("task", "asked"), ("examples", "questions", "requests"))
    for task in tasks:
        add_row(
            table,
            task.name,
            task.what,
            "its own" if task.shots is None else str(task.shots),
            _asked(task),
            ABSENT if task.requests is None else f"{task.requests:,}",
        )
    console.print(table)
    say(console, "requests: answers that each of the two models gives", "dim")
    console.print()


def _asked(task: ForeseenTask) -> str:
    """How many questions, of how many."""
    if task.total is None:
        return "all" if task.limit is None else f"first {task.limit:,}"
    return f"{task.total:,}" if task.limit is None or task.limit >= task.total else f"{task.limit:,}/{task.total:,}"


def _score(result: TaskResult, value: float | None) -> str:
    """A share in percent; what is none, such as a perplexity, as a number."""
    shares = result.stderr is not None or result.metric.startswith(("acc", "exact_match"))
    return percent(value) if shares else significant(value)
