"""What the verbs that show tables share: a console, tables that lose nothing at any width, and plain JSON."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

from compressor.report.numbers import NBSP

PIPE_WIDTH = 120
"""Characters in a line of a table when nobody is watching."""

GAPS = (3, 2, 1)
"""Spaces between two columns, as there is room."""

NARROW = 14
"""Characters below which a column of names is not squeezed: each row is told on lines of its own then."""

PIECE = re.compile(r"[^\s./_,:-]*[\s./_,:-]|[^\s./_,:-]+")
"""Where a name may be broken: after these characters."""


def wide_console() -> Console:
    """A console on standard output; wide when that is no terminal. Nothing in a name is taken for markup."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(width=None if known else PIPE_WIDTH, markup=False, highlight=False)


def say(console: Console, words: str | Text, style: str = "") -> None:
    """Print a sentence, control characters spelled out; whole where nobody watches, else in lines as far in as it."""
    text = Text(printable(words), style) if isinstance(words, str) else words
    inner = len(text.plain) - len(text.plain.lstrip(" "))
    if not console.is_terminal or not inner:
        console.print(text, soft_wrap=not console.is_terminal)
        return
    for line in text[inner:].wrap(console, max(console.width - inner, NARROW)):
        line.rstrip()
        console.print(Text(" " * inner).append_text(line), soft_wrap=True)


@dataclass
class Sheet:
    """A table with text columns ``left`` and number columns ``right``, for a console of any width.

    Where it is too wide its columns move together, the headings of numbers are broken, then names; where that is not
    enough, every row is told on lines of its own. No cell is cut.
    """

    title: str
    left: tuple[str, ...]
    right: tuple[str, ...]
    rows: list[tuple[str, ...] | None] = field(default_factory=list)

    def add_section(self) -> None:
        """Draw a line under the last row."""
        self.rows.append(None)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        rule = "─" if console.encoding.startswith("utf") else "-"
        if self.title:
            for line in Text(self.title, "bold").wrap(console, options.max_width):
                line.rstrip()
                yield line
        layout = self._layout(options.max_width)
        if layout is None:
            yield from self._told(options.max_width)
        else:
            yield from self._drawn(*layout, rule)
        yield Text("")

    def _layout(self, room: int) -> tuple[list[int], int] | None:
        """Widths of the columns and the gap between two; None where no table fits."""
        names = [self._width(column, head) for column, head in enumerate(self.left)]
        for broken in (False, True):
            numbers = [
                self._width(len(self.left) + index, _broken(head) if broken else head)
                for index, head in enumerate(self.right)
            ]
            for gap in GAPS:
                if sum(names) + sum(numbers) + gap * (len(names) + len(numbers) - 1) <= room:
                    return [*names, *numbers], gap
        for gap, least in ((2, 2 * NARROW), (1, NARROW)):
            spare = room - sum(numbers) - gap * (len(names) + len(numbers) - 1)
            squeezed = list(names)
            while sum(squeezed) > spare and max(squeezed, default=0) > least:
                squeezed[squeezed.index(max(squeezed))] -= 1
            if sum(squeezed) <= spare:
                return [*squeezed, *numbers], gap
        return None

    def _width(self, column: int, head: str) -> int:
        cells = [row[column] for row in self.rows if row is not None]
        return max((cell_len(line) for cell in (head, *cells) for line in cell.split("\n")), default=0)

    def _drawn(self, widths: Sequence[int], gap: int, rule: str) -> Iterator[Text]:
        heads = [_fold(head, width) for head, width in zip((*self.left, *self.right), widths, strict=True)]
        line = Text(rule * (sum(widths) + gap * (len(widths) - 1)), "dim")
        yield from self._lines(heads, widths, gap, "dim", last=True)
        yield line
        for row in self.rows:
            if row is None:
                yield line
                continue
            cells = [_fold(cell, width) for cell, width in zip(row, widths, strict=True)]
            yield from self._lines(cells, widths, gap, "")

    def _lines(
        self, cells: Sequence[Sequence[str]], widths: Sequence[int], gap: int, style: str, *, last: bool = False
    ) -> Iterator[Text]:
        """The lines of a row; its cells begin in the first of them, or end in the ``last``."""
        height = max(len(cell) for cell in cells)
        for number in range(height):
            parts = []
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
                place = number - (height - len(cell)) if last else number
                words = cell[place] if 0 <= place < len(cell) else ""
                space = " " * (width - cell_len(words))
                parts.append(words + space if column < len(self.left) else space + words)
            yield Text((" " * gap).join(parts).rstrip(), style)

    def _told(self, room: int) -> Iterator[Text]:
        """Every row on lines of its own: its names, then number after number with what it is."""
        for row in self.rows:
            if row is None:
                continue
            names = ", ".join(cell for cell in row[: len(self.left)] if cell)
            for line in _fold(names, room):
                yield Text(line, "bold")
            pairs = [f"{head} {cell}" for head, cell in zip(self.right, row[len(self.left) :], strict=True) if cell]
            line = ""
            for pair in pairs:
                longer = f"{line}, {pair}" if line else f"  {pair}"
                if line and cell_len(longer) > room - 1:
                    yield Text(f"{line},")
                    longer = f"  {pair}"
                line = longer
            yield Text(line)


def _broken(head: str) -> str:
    return head.replace(" ", "\n")


def _fold(words: str, width: int) -> list[str]:
    """``words`` in lines of at most ``width`` characters, broken after a space, dot, slash or the like."""
    lines = [""]
    for piece in PIECE.findall(words) if cell_len(words) > width else [words]:
        if cell_len(lines[-1] + piece.rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += piece
        while cell_len(lines[-1].rstrip()) > width:  # one long word
            whole = lines.pop()
            cut = max(1, width if cell_len(whole) == len(whole) else width // 2)
            lines += [whole[:cut], whole[cut:]]
    return [line.rstrip() for line in lines]


def new_table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Sheet:
    """A table with text columns ``left`` and number columns ``right``."""
    return Sheet(title, left, right)


def print_facts(console: Console, facts: dict[str, str]) -> None:
    """Print what is known of things, a thing a line; a value that goes on in another line stays in its column."""
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = _fold(printable(value), max(console.width - width - 2, NARROW)) if console.is_terminal else [value]
        for number, line in enumerate(shown):
            console.print(f"{name if not number else '':{width}}  {line}", soft_wrap=True)


def printable(words: str) -> str:
    """``words`` with control characters spelled out: a name in a checkpoint must not steer the terminal."""
    return "".join(char if char.isprintable() or char == NBSP else f"\\x{ord(char):02x}" for char in words)


def add_row(table: Sheet, *cells: str) -> None:
    """Add a row of texts, control characters spelled out."""
    table.rows.append(tuple(printable(cell) for cell in cells))


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
