"""Progress with time left: a bar on a terminal, elsewhere (a pipe, a log file) a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from compressor.report.numbers import duration

SILENT = 30.0
"""Seconds between two lines of progress, at least."""


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
        if self.verbosity < 0 or not self.console.is_terminal or self.console.is_dumb_terminal:
            yield Lines(self, total, done)
            return
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        with bar:
            yield Bar(bar, bar.add_task("", total=total, completed=done))


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
    """Within, libraries draw no progress bars of their own, not even where they say that one is wanted."""
    tqdm: Any = import_module("tqdm").tqdm
    before = tqdm.__init__

    def silent(bar: Any, *args: Any, **settings: Any) -> None:
        before(bar, *args, **{**settings, "disable": True})

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = before


def quiet() -> Voice:
    """A voice for Python callers: warnings only."""
    return Voice(Console(stderr=True), -1)
