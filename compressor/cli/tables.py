"""What the verbs that show tables share: a console that never cuts a name, and plain JSON."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from compressor.report.numbers import NBSP

PIPE_WIDTH = 160  # characters, when nobody is watching


def wide_console() -> Console:
    """A console on standard output; wide when that is no terminal. Nothing in a name is taken for markup."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, markup=False, highlight=False)


def new_table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    """A table with text columns ``left`` (folded when too long) and number columns ``right``."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def printable(words: str) -> str:
    """``words`` with control characters spelled out: a name in a checkpoint must not steer the terminal."""
    return "".join(char if char.isprintable() or char == NBSP else f"\\x{ord(char):02x}" for char in words)


def add_row(table: Table, *cells: str) -> None:
    """Add a row of texts, control characters spelled out."""
    table.add_row(*(printable(cell) for cell in cells))


def json_text(value: Any) -> str:
    """Strict JSON: what is no finite number becomes the text ``"Infinity"``, ``"-Infinity"`` or ``"NaN"``."""
    return json.dumps(_strict(value), indent=1, ensure_ascii=False, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    return value
