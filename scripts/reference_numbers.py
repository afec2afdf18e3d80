"""Rows of docs/benchmarks.md for the page of a method, so that a page quotes and never remembers."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
SLUG = re.compile(r"[^\w\s-]")


def numbers(heading: str, head: str, rows: str, says: str = "") -> str:
    """Rows of a table under a heading.

    Args:
        heading: the heading, whole.
        head: a regular expression that the first cell of the table's head matches; the first such table counts.
        rows: a regular expression that the first cell of a row matches, whole.
        says: a sentence in front of it.

    Raises:
        ValueError: there is no such heading, table or row.
    """
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    starts = [at for at, line in enumerate(lines) if re.fullmatch(rf"#+ {re.escape(heading)}", line)]
    if len(starts) != 1:
        raise ValueError(f"docs/benchmarks.md has {len(starts)} headings {heading!r}")
    for at in range(starts[0] + 1, len(lines) - 1):
        if lines[at].startswith("#"):
            break
        if lines[at + 1].startswith("| ---") and re.match(head, first_cell(lines[at])):
            end = next(n for n in range(at, len(lines)) if not lines[n].startswith("|"))
            body = [line for line in lines[at + 2 : end] if re.fullmatch(rows, first_cell(line))]
            if not body:
                raise ValueError(f"docs/benchmarks.md, {heading}: no row {rows!r}")
            link = f"[{heading}](../benchmarks.md#{slug(heading)})"
            quoted = [line.replace("**", "") for line in body]  # bold is the best of all rows, not of these
            return "\n".join([f"{says or 'From'} {link}:", "", lines[at], lines[at + 1], *quoted])
    raise ValueError(f"docs/benchmarks.md, {heading}: no table that begins with {head!r}")


def first_cell(line: str) -> str:
    """The first cell of a row."""
    return line.split("|")[1].strip()


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[-\s]+", "-", SLUG.sub("", heading).strip().lower())
