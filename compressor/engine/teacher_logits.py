"""Predictions of the dense model on disk, so that a student can learn from them without the model beside it.

Of every token, the largest probabilities and whose they are. Nothing else is kept: what is left to one follows from
them, and the loss counts it as one outcome (``engine/distill.py``). One pair of tensors a window, read when the window
is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.tensorfile import Layout, read_header, read_tensor, write_file

LOGITS_AT_ONCE = 1 << 23
"""Elements of a logit tensor (tokens x vocabulary) that are held together."""

STORED = torch.float16
"""Dtype of stored log-probabilities. Half precision, not bfloat16: they lie between some -20 and 0, where its range is
enough and its three bits more count. An error of log p is one of p log p in the loss: 2^-12 |log p| of p, at most
2e-4 for one token, against 1e-3 in bfloat16; a log-probability that is too small for it is rounded to p = 1."""


@dataclass(frozen=True)
class TopLogits:
    """The largest predictions.

    Attributes:
        logs: their log-probabilities, (..., k) fp32.
        chosen: the tokens they belong to, (..., k) int64.
    """

    logs: Tensor
    chosen: Tensor


def largest(logits: Tensor, top_k: int) -> TopLogits:
    """The ``top_k`` largest of ``logits`` (..., V), normalized over all of them."""
    found = logits.float().log_softmax(-1).topk(min(top_k, logits.shape[-1]), -1)
    return TopLogits(found.values, found.indices)


def index_dtype(vocabulary: int) -> torch.dtype:
    """The smallest integers that count a vocabulary."""
    return torch.uint8 if vocabulary <= 1 << 8 else torch.uint16 if vocabulary <= 1 << 16 else torch.int32


def stored_bytes(tokens: int, top_k: int, vocabulary: int) -> int:
    """Bytes of the predictions for so many tokens, without the file's header."""
    return tokens * min(top_k, vocabulary) * (STORED.itemsize + index_dtype(vocabulary).itemsize)


@torch.no_grad()
def store_logits(
    file: Path, runner: BlockRunner, stream: Stream, top_k: int, tick: Callable[[int], None] = lambda tokens: None
) -> int:
    """Write the predictions for a stream that has passed every block of the dense model; the file appears when whole.

    Args:
        runner: that has what is outside the blocks loaded.
        tick: told the tokens of every window.

    Returns:
        Bytes written.
    """
    vocabulary = int(runner.skeleton.config.get_text_config().vocab_size)
    length, k = stream.ids.shape[1], min(top_k, vocabulary)
    at_once = max(1, LOGITS_AT_ONCE // vocabulary)
    layout: Layout = {}
    for window in range(len(stream.ids)):  # in the order of the windows, so that one is in memory at a time
        layout[f"{window}.chosen"] = (index_dtype(vocabulary), (length, k))
        layout[f"{window}.logs"] = (STORED, (length, k))
    held: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in held:
            window = int(name.partition(".")[0])
            found = [_part(runner, stream, window, slice(i, i + at_once), k) for i in range(0, length, at_once)]
            held[f"{window}.chosen"] = torch.cat([part.chosen for part in found]).to(index_dtype(vocabulary))
            least = torch.finfo(STORED).min  # instead of minus infinity, whose product with 0 is none
            held[f"{window}.logs"] = torch.cat([part.logs for part in found]).clamp_min(least).to(STORED)
            tick(length)
        return held.pop(name)

    return write_file(file, layout, read)


def _part(runner: BlockRunner, stream: Stream, window: int, tokens: slice, k: int) -> TopLogits:
    """Predictions for some tokens of a window, on the CPU; the head knows no positions."""
    hidden = stream.states[window : window + 1, tokens].to(runner.device)
    found = largest(runner.head(stream.ids[window : window + 1, tokens], hidden)[0], k)
    return TopLogits(found.logs.cpu(), found.chosen.cpu())


class StoredTeacher:
    """Answers as the dense model would, from its predictions on disk.

    Args:
        file: written by :func:`store_logits`; every process reads the same one.
        device: where the answers are wanted.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        self._entries = read_header(file)
        self._device = device

    def __call__(self, windows: Sequence[int], ids: Tensor) -> TopLogits:
        """Predictions (windows, length, k) for windows named by their numbers; ``ids`` are not looked at."""
        logs, chosen = (
            torch.stack([read_tensor(self._entries[f"{window}.{leaf}"]) for window in windows]).to(self._device)
            for leaf in ("logs", "chosen")
        )
        return TopLogits(logs.float(), chosen.long())
