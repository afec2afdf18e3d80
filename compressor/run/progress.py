"""Progress with time left on a terminal; silence elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partialmethod
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


@dataclass(frozen=True)
class Voice:
    """How a command speaks: ``verbosity`` -1 quiet, 0 normal, 1 with details. Everything goes to standard error."""

    console: Console
    verbosity: int = 0

    def say(self, message: str) -> None:
        """Tell what is happening."""
        if self.verbosity >= 0:
            self.console.print(message, highlight=False, markup=False)

    def detail(self, message: str) -> None:
        """Tell what only ``-v`` wants to know."""
        if self.verbosity > 0:
            self.console.print(message, highlight=False, markup=False, style="dim", soft_wrap=True)

    def warn(self, message: str) -> None:
        """Tell what a person should not miss."""
        self.console.print(Text.assemble(("warning:", "yellow"), f" {message}"), highlight=False)

    @contextmanager
    def progress(self, total: int, *, done: int = 0) -> Iterator[Ticker]:
        """Show a bar over ``total`` steps, if there is a terminal to show it on."""
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=self.verbosity < 0 or not self.console.is_terminal,
            transient=True,
        )
        with bar:
            yield Ticker(bar, bar.add_task("", total=total, completed=done))


@dataclass(frozen=True)
class Ticker:
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
    """Within, libraries draw no progress bars of their own; one that a library asks for on purpose is drawn."""
    tqdm: Any = import_module("tqdm").tqdm
    before = tqdm.__init__
    tqdm.__init__ = partialmethod(before, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = before


def quiet() -> Voice:
    """A voice for Python callers: warnings only."""
    return Voice(Console(stderr=True), -1)
