"""Every message that the page on troubleshooting quotes is still one that the program gives."""

from __future__ import annotations

import ast
import re

import pytest
from doc_blocks import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OURS, OTHERS = PAGE.split("## What others say\n")
QUOTED = re.findall(r"(?m)^### (.*)$", OURS)
OPEN = "…"
"""Stands for what a message fills in, in the page as in `messages`."""


def messages() -> list[str]:
    """All texts in the package, with what is filled in left open."""
    found = []
    for path in sorted((ROOT / "compressor").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else OPEN for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


MESSAGES = messages()


def test_many_messages_are_explained() -> None:
    assert len(QUOTED) >= 40
    assert len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("heading", QUOTED)
def test_the_message_exists(heading: str) -> None:
    assert re.fullmatch(r"`[^`]+`", heading), "a heading is a message and nothing else"
    assert any(heading.strip("`") in message for message in MESSAGES), f"no text of the program has {heading}"


def test_an_invented_message_would_be_noticed() -> None:
    assert not any("the moon is not available here" in message for message in MESSAGES)
    assert any(f"device {OPEN} is not available here" in message for message in MESSAGES)


def test_every_message_is_followed_by_what_to_do() -> None:
    for part in re.split(r"(?m)^### ", PAGE)[1:]:
        assert len(part.split("\n", 1)[1].split("\n## ")[0].split()) >= 8, part.splitlines()[0]
