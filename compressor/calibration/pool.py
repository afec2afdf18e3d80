"""Which documents are read for a number of tokens: enough of them, in a seeded order, never a whole huge file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from compressor.calibration.spec import SourceSpec
from compressor.calibration.tokens import Joined, Tokenizer, join_documents

BUFFER_CHARACTERS = 32_000_000
BUFFER_DOCUMENTS = 20_000
_CHARACTERS_PER_TOKEN = 6  # English has 4 to 5; when a text has more, the loop below reads on


@dataclass(frozen=True)
class Pool:
    """A token stream and the texts it is made of."""

    joined: Joined
    texts: list[str]

    @property
    def ids(self) -> Tensor:
        return self.joined.ids


def shuffled(documents: Iterator[str], generator: torch.Generator) -> Iterator[str]:
    """Yield ``documents`` in a seeded order, one buffer of at most ``BUFFER_*`` after the other."""
    for first in documents:
        buffer: list[str] = []
        _fill(buffer, chain([first], documents), 0)
        for index in torch.randperm(len(buffer), generator=generator).tolist():
            yield buffer[index]


def read_pool(
    documents: Iterator[str], tokenizer: Tokenizer, spec: SourceSpec, join: str | None, needed: int, seed: int
) -> Pool:
    """Read ``documents`` until they hold at least ``needed`` tokens, or all of them when they do not.

    ``concatenate`` takes documents in a random order out of a buffer (``BUFFER_DOCUMENTS``, ``BUFFER_CHARACTERS``),
    ``first`` takes them in their order, ``windows`` takes the whole buffer in its order.
    """
    budget = needed * _CHARACTERS_PER_TOKEN
    buffer: list[str] = []
    while True:
        exhausted = _fill(buffer, documents, budget)
        if spec.sampling == "concatenate":
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(buffer), generator=generator).tolist()
        else:
            order = list(range(len(buffer)))
        limit = max(budget, BUFFER_CHARACTERS) if spec.sampling == "windows" else budget
        texts = _take([buffer[index] for index in order], limit)
        joined = join_documents(tokenizer, texts, join)
        complete = exhausted and sum(map(len, texts)) == sum(map(len, buffer))
        if len(joined.ids) >= needed or complete:
            return Pool(joined, texts)
        budget *= 2


def _fill(buffer: list[str], documents: Iterator[str], at_least: int) -> bool:
    """Add to ``buffer`` until it is full and holds ``at_least`` characters; True when ``documents`` has ended."""
    size = sum(map(len, buffer))
    while (size < BUFFER_CHARACTERS and len(buffer) < BUFFER_DOCUMENTS) or size < at_least:
        text = next(documents, None)
        if text is None:
            return True
        buffer.append(text)
        size += len(text)
    return False


def _take(texts: list[str], characters: int) -> list[str]:
    """Return the first of ``texts`` that hold ``characters``; the last is cut when it is much longer than needed."""
    taken: list[str] = []
    size = 0
    for text in texts:
        if size >= characters:
            break
        piece = text if len(text) <= 2 * characters else text[: characters - size]
        taken.append(piece)
        size += len(piece)
    return taken
