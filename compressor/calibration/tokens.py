"""Text to token ids, with a tokenizer that is left as it was."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from compressor.errors import UserError

SEPARATORS = {"two-newlines": "\n\n", "newline": "\n", "space": " ", "none": ""}


class Tokenizer(Protocol):
    """The part of a ``transformers`` tokenizer that is used here."""

    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: Any

    def __call__(self, text: Any, **kwargs: Any) -> Any: ...
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
    def convert_ids_to_tokens(self, ids: Any) -> Any: ...
    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...
    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Joined:
    """Documents as one stream: ``ids`` (tokens,) int64, the ``join`` that was used, and the ``characters`` covered."""

    ids: Tensor
    join: str
    characters: int


def private_copy(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy to work with: calling a tokenizer resets the truncation and padding stored in it."""
    return copy.deepcopy(tokenizer)


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens, without truncation."""
    if not texts:
        return []
    settings = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
    return cast("list[list[int]]", tokenizer(list(texts), **settings)["input_ids"])


def join_documents(tokenizer: Tokenizer, documents: Sequence[str], join: str | None) -> Joined:
    """Tokenize ``documents`` as one stream.

    ``join="eos"`` tokenizes each document for itself and puts the end-of-sequence token between two; a string join
    makes one text and tokenizes it once, as the published WikiText-2 protocol does. ``None`` is ``"eos"``, or
    ``"two-newlines"`` with a tokenizer that has no such token.

    Raises:
        UserError: ``"eos"`` was asked for and the tokenizer has none.
    """
    eos = tokenizer.eos_token_id
    if join == "eos" and eos is None:
        raise UserError("join=eos: the tokenizer has no end-of-sequence token", fix="use join=two-newlines")
    if join == "eos" or (join is None and eos is not None):
        flat: list[int] = []
        for index, ids in enumerate(encode(tokenizer, documents)):
            if index:
                flat.append(cast("int", eos))
            flat.extend(ids)
        return Joined(torch.tensor(flat, dtype=torch.int64), "eos", sum(map(len, documents)))
    name = join or "two-newlines"
    text = SEPARATORS[name].join(documents)
    ids = encode(tokenizer, [text])[0] if text else []
    return Joined(torch.tensor(ids, dtype=torch.int64), name, len(text))


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return one more than the largest id the tokenizer knows."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_vocabulary(ids: Tensor, size: int, what: str) -> None:
    """Refuse ids outside ``[0, size)``.

    Raises:
        UserError: names the first offending id and where it stands.
    """
    wrong = ((ids < 0) | (ids >= size)).nonzero()
    if len(wrong):
        place = tuple(wrong[0].tolist())
        value = int(ids[place])
        raise UserError(
            f"{what}: token id {value} at {list(place)} is outside the tokenizer's vocabulary of {size}",
            fix="give ids made with this model's tokenizer to --calibration",
        )


def sha256_ids(ids: Tensor) -> str:
    """Return the SHA-256 of the int64 little-endian bytes of ``ids``."""
    return hashlib.sha256(ids.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def sha256_texts(texts: Sequence[str]) -> str:
    """Return the SHA-256 of the texts in UTF-8, each preceded by its length so that borders count."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
