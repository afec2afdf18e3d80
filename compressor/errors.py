"""The one exception for mistakes a user can mend."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is larger than this disk or account may hold",
}
"""What the system says when a file does not fit -> in words."""


class UserError(Exception):
    """A mistake in what was asked for. Shown as one line, without a traceback; exit code 2.

    Args:
        message: names the thing and what was expected of it.
        fix: the flag or action that mends it, shown after the message.
    """

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(f"{message}; {fix}" if fix else message)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest of ``known``, or the list of all when none is close.

    A name with the whole word in it is closer than one that only looks alike: ``bits`` is meant by ``salient_bits``.
    """
    names = sorted(known)
    whole = [name for name in names if word and word in re.split("[_-]", name)]
    close = whole or difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else f" (known: {', '.join(names)})"


@contextmanager
def in_words_of(words: Mapping[str, str]) -> Iterator[None]:
    """Say what is raised inside with other words: what reads a text does not know which flag of which verb named it.

    Args:
        words: a whole word or flag of the message -> what stands there instead.
    """
    try:
        yield
    except UserError as error:
        found = "|".join(map(re.escape, words))
        said = re.sub(rf"(?<![\w-])(?:{found})(?![\w-])", lambda match: words[match[0]], str(error))
        raise UserError(said) from error
