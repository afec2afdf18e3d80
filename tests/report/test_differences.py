"""Two texts with what differs marked."""

from __future__ import annotations

import re

import pytest

from compressor.report.differences import marked

PAIRS = [
    ("a small house by the river.", "a small boat by the river."),
    ("one two three", "one two three"),
    ("", "something"),
    ("something", ""),
    ("", ""),
    ("  two\n\nlines  here ", "  two\n\nother lines here "),
    ('<b>&amp;</b> "quoted"', "<script>alert(1)</script>"),
    ("été naïve 日本", "été 日本 naïve"),
]


def plain(markup: str) -> str:
    text = re.sub(r"</?mark[^>]*>", "", markup)
    for mark, char in (("&lt;", "<"), ("&gt;", ">"), ("&#34;", '"'), ("&#39;", "'"), ("&amp;", "&")):
        text = text.replace(mark, char)
    return text


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_nothing_is_lost_and_nothing_runs(before: str, after: str) -> None:
    found = marked(before, after)
    assert plain(found.before) == before
    assert plain(found.after) == after
    assert "<script" not in found.after and "<b>" not in found.before
    unmarked = [re.sub(r"<mark.*?</mark>", "", text, flags=re.DOTALL).split() for text in (found.before, found.after)]
    assert unmarked[0] == unmarked[1]  # what is not marked is the same


def test_what_differs_is_marked() -> None:
    found = marked(*PAIRS[0])
    assert found.before == 'a small <mark class="gone">house</mark> by the river.'
    assert found.after == 'a small <mark class="new">boat</mark> by the river.'
    assert found.told == "the same for the first 2 of 6 words"
    assert marked(*PAIRS[1]).told == "word for word the same"
    assert "<mark" not in marked(*PAIRS[1]).after
