"""Two texts side by side with what differs marked: by underline as well as by colour, so that it prints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

from markupsafe import Markup, escape

WORD = re.compile(r"\s*\S+|\s+\Z")
"""A word with the white space before it."""


@dataclass(frozen=True)
class Marked:
    """Two texts, marked; ``same`` is how many words at the beginning are equal, ``shared`` the share of all words."""

    before: Markup
    after: Markup
    same: int
    words: int
    shared: float

    @property
    def told(self) -> str:
        """``the same for 7 of 24 words``."""
        if self.shared == 1:
            return "word for word the same"
        return f"the same for the first {self.same} of {self.words} word{'s' if self.words != 1 else ''}"


def marked(before: str, after: str) -> Marked:
    """Mark in ``before`` what ``after`` lacks, and in ``after`` what is new."""
    old, new = WORD.findall(before), WORD.findall(after)
    blocks = SequenceMatcher(None, [w.strip() for w in old], [w.strip() for w in new], autojunk=False).get_opcodes()
    left, right = [], []
    for kind, a, b, c, d in blocks:
        left.append(_span(old[a:b], "gone" if kind != "equal" else ""))
        right.append(_span(new[c:d], "new" if kind != "equal" else ""))
    same = next((a for kind, a, *_ in blocks if kind != "equal"), len(old))
    equal = sum(b - a for kind, a, b, *_ in blocks if kind == "equal")
    total = max(len(old), len(new))
    return Marked(Markup("").join(left), Markup("").join(right), same, len(new), equal / total if total else 1.0)


def _span(words: list[str], css: str) -> Markup:
    if not words:
        return Markup("")
    whole = "".join(words)
    if not css:
        return escape(whole)
    inner = whole.lstrip()
    return (
        escape(whole[: len(whole) - len(inner)]) + Markup(f'<mark class="{css}">') + escape(inner) + Markup("</mark>")
    )
