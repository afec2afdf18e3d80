"""Progress with time left: a bar on a terminal, elsewhere (a pipe, a log file) a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from compressor.report.numbers import duration

SILENT = 30.0
"""Seconds between two lines of progress, at least."""

COUNTED = 1000
"""Steps that a person still counts are fewer."""

WIDE = 100
"""Columns of a terminal from which a bar may be long."""


@dataclass(frozen=True)
class Voice:
    """How a command speaks: ``verbosity`` -1 quiet, 0 normal, 1 with details. Everything goes to standard error."""

    console: Console
    verbosity: int = 0

    def say(self, message: str) -> None:
        """Tell what is happening."""
        if self.verbosity >= 0:
            self.console.print(message, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def detail(self, message: str) -> None:
        """Tell what only ``-v`` wants to know."""
        if self.verbosity > 0:
            self.console.print(message, highlight=False, markup=False, style="dim", soft_wrap=True)

    def warn(self, message: str) -> None:
        """Tell what a person should not miss."""
        text = Text.assemble(("warning:", "yellow"), f" {message}")
        self.console.print(text, highlight=False, soft_wrap=not self.console.is_terminal)

    @contextmanager
    def progress(self, total: int, *, done: int = 0) -> Iterator[Ticker]:
        """Show how far ``total`` steps are: by a bar where there is a terminal that can draw one, else by lines."""
        if not self._draws:
            yield Lines(self, total, done)
            return
        bar = Progress(
            BarColumn(40 if self.console.width >= WIDE else 12),
            HowFar(),
            TimeLeft(),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            console=self.console,
            transient=True,
            expand=True,  # what is long is cut in the last column, not the numbers
        )
        with bar:
            yield Bar(bar, bar.add_task("", total=total, completed=done, first=done))

    @contextmanager
    def meanwhile(self, what: str) -> Iterator[Callable[[str], None]]:
        """Show on a terminal that something goes on of which nobody knows how far it is; is told what it is by now."""
        if not self._draws:
            self.detail(what)
            yield self.detail
            return
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        with Progress(*columns, console=self.console, transient=True) as shown:
            task = shown.add_task(what, total=None)
            yield lambda now: shown.update(task, description=now)

    @property
    def _draws(self) -> bool:
        return self.verbosity >= 0 and self.console.is_terminal and not self.console.is_dumb_terminal


class Ticker(Protocol):
    """Is told how far things are."""

    def now(self, what: str) -> None:
        """Name the step at hand."""

    def advance(self, steps: int = 1) -> None:
        """Move on."""

    def reach(self, steps: int) -> None:
        """Move to a place."""


@dataclass
class Lines:
    """Says how far things are where nothing can be drawn: after half a minute, then less and less often.

    Attributes:
        clock: seconds.
    """

    voice: Voice
    total: int
    done: int
    clock: Callable[[], float] = time.monotonic
    what: str = ""

    def __post_init__(self) -> None:
        self.began, self.first = self.clock(), self.done
        self.next = self.began + SILENT

    def now(self, what: str) -> None:
        """Name the step at hand."""
        self.what = what

    def advance(self, steps: int = 1) -> None:
        """Move on."""
        self.reach(self.done + steps)

    def reach(self, steps: int) -> None:
        """Move to a place."""
        self.done = steps
        if (now := self.clock()) < self.next:
            return
        spent = now - self.began
        self.next = now + max(SILENT, spent / 10)
        left = spent / (self.done - self.first) * (self.total - self.done) if self.done > self.first else None
        about = f", about {duration(left)} left" if left is not None and self.done < self.total else ""
        where = f"{self.what}: " if self.what else ""
        self.voice.say(f"{where}{self.done:,} of {self.total:,} after {duration(spent)}{about}")


class HowFar(ProgressColumn):
    """Steps that a person can count are counted, of more a share is told: ``2/3``, ``34 %``."""

    def render(self, task: Task) -> Text:
        total, done = int(task.total or 0), int(task.completed)
        shown = f"{done}/{total}".rjust(2 * len(str(total)) + 1) if total < COUNTED else f"{100 * done // total:3} %"
        return Text(shown, "progress.download")


class TimeLeft(ProgressColumn):
    """Time left, from all the time spent: steps may take minutes. Before the first step is done, the time spent."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.at = 0.0, 0.0

    def render(self, task: Task) -> Text:
        spent, total = task.elapsed or 0.0, task.total or 0.0
        if task.completed != self.reached:
            self.reached, self.at = task.completed, spent
        gone = task.completed - task.fields["first"]
        if gone <= 0:
            return Text(f"{_clock(spent)} so far", "progress.elapsed")
        left = self.at / gone * (total - task.completed) - (spent - self.at)
        return Text(f"{_clock(max(left, 0.0))} left", "progress.remaining")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


@dataclass(frozen=True)
class Bar:
    """Moves a progress bar."""

    bar: Progress
    task: int

    def now(self, what: str) -> None:
        """Name the step at hand."""
        self.bar.update(self.task, description=what)  # type: ignore[arg-type]

    def advance(self, steps: int = 1) -> None:
        """Move on."""
        self.bar.advance(self.task, steps)  # type: ignore[arg-type]

    def reach(self, steps: int) -> None:
        """Move to a place."""
        self.bar.update(self.task, completed=steps)  # type: ignore[arg-type]


@contextmanager
def without_bars() -> Iterator[None]:
    """Within, libraries draw no progress bars of their own, not even where they say ``disable=False``."""
    tqdm: Any = import_module("tqdm").tqdm
    before = tqdm.__init__

    def silent(bar: Any, *arguments: Any, **settings: Any) -> None:
        before(bar, *arguments, **{**settings, "disable": True})

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = before


def quiet() -> Voice:
    """A voice for Python callers: warnings only."""
    return Voice(Console(stderr=True), -1)
