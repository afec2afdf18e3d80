"""Answers to tasks, as a person reads them in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.cli.tables import add_row, new_table, say, wide_console
from compressor.report.numbers import ABSENT, percent, significant
from compressor.report.schema_use import TaskResult


def print_tasks(results: Sequence[TaskResult], against: str | None) -> None:
    """Print a table and what it says.

    Args:
        against: the model that was asked the same.
    """
    console = wide_console()
    base = ("base",) if against is not None else ()
    table = new_table("", ("task", "metric"), ("score", "±", *base, "chance", "above it", "asked"))
    for result in results:
        known = result.chance is not None
        add_row(
            table,
            result.task,
            result.metric,
            _score(result, result.value),
            _score(result, result.stderr) if result.stderr is not None else ABSENT,
            *(_score(result, each) for each in ([result.base] if against is not None else [])),
            percent(result.chance) if known else ABSENT,
            percent(result.corrected) if result.corrected is not None else ABSENT,
            f"{result.samples:,}" + (f"/{result.total:,}" if result.total not in (None, result.samples) else ""),
        )
    console.print(table)
    if any(result.chance is not None for result in results):
        say(console, "above it: (score - chance) / (1 - chance); ±: standard error", "dim")
    told: dict[str, list[str]] = {}
    for result in results:
        if result.verdict:
            told.setdefault(result.verdict, []).append(f"{result.task} {result.metric}")
    for verdict, names in told.items():
        say(console, f"{', '.join(names)}: {verdict}")


def _score(result: TaskResult, value: float | None) -> str:
    """A share in percent; what is none, such as a perplexity, as a number."""
    return significant(value) if result.stderr is None else percent(value)
