"""The fenced blocks of the documentation, and what of the command line stands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?m)^(?:<!-- not run: (?P<reason>.*?) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.DOTALL)
MARK = re.compile(r"(?m)^<!-- not run")
IN_LINE = re.compile(r"`(compressor(?: [^`]*)?)`")
ENTRY = "-m compressor.cli.app "


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        reason: why it cannot be run by a test; None where it is run.
    """

    page: str
    kind: str
    body: str
    reason: str | None


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page, from top to bottom."""
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        yield Block(str(page.relative_to(ROOT)), found["kind"], found["body"], found["reason"])


def typed(block: Block) -> list[str]:
    """The lines that are typed: behind a dollar sign, without the remark at the end."""
    lines = block.body.replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+# .*$", "", line[2:]).strip() for line in lines if line.startswith("$ ")]


def words_of(line: str) -> list[str] | None:
    """The words behind ``compressor``, also where a launcher starts it; None for another program."""
    if ENTRY in line:
        line = "compressor " + line.split(ENTRY, 1)[1]
    words = shlex.split(line)
    return words[1:] if words[0] == "compressor" else None
