"""Time and memory of the next token, by how much text stands before it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from compressor.hf.caches import read_on
from compressor.hf.linear_cache import LinearState
from compressor.report.schema_linear import Decode, DecodeRow
from compressor.run.proof_models import device_of

PREFILL = 512
"""Tokens read at once: one long context is read once, and timed at several places on the way."""


def cache_bytes(cache: Any) -> int:
    """Return the bytes that a transformers cache holds: keys and values, and states of every kind."""
    return sum(layer_bytes(layer) for layer in cache.layers)


def layer_bytes(layer: Any) -> int:
    """Return the bytes that one layer of a cache holds."""
    return sum(tensor.numel() * tensor.itemsize for tensor in _tensors(vars(layer)))


def _is_state(layer: Any) -> bool:
    """Whether a layer of a cache is one of constant size, ours or one of transformers."""
    return isinstance(layer, LinearState) or (hasattr(layer, "recurrent_states") and not hasattr(layer, "keys"))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)


class _Reader:
    """A model that reads a repeated text ever further, with a deadline."""

    def __init__(self, model: Any, text: Tensor) -> None:
        self.model, self.text = model, text.to(device_of(model))
        self.cache: Any = None
        self.seen = 0

    def read(self, count: int) -> None:
        at = (self.seen + torch.arange(count, device=self.text.device)) % len(self.text)
        _, self.cache = read_on(self.model, self.cache, input_ids=self.text[at][None], logits_to_keep=1)
        self.seen += count

    def read_to(self, context: int, deadline: float) -> bool:
        """Whether the context was reached in time."""
        while self.seen < context:
            if time.perf_counter() > deadline:
                return False
            self.read(min(PREFILL, context - self.seen))
        self._wait()
        return True

    def step(self) -> float:
        """Seconds for one token."""
        since = time.perf_counter()
        self.read(1)
        self._wait()
        return time.perf_counter() - since

    def _wait(self) -> None:
        if self.text.device.type == "cuda":
            torch.cuda.synchronize(self.text.device)


@torch.no_grad()
def decode(
    teacher: Any,
    student: Any,
    ids: Tensor,
    *,
    contexts: Sequence[int] = (256, 1024, 4096),
    steps: int = 16,
    seconds: float = 20.0,
) -> Decode:
    """Time single tokens of one text. The models take turns at every token, so that a busy machine treats them alike.

    Args:
        ids: int64 token ids of any shape; repeated to the length that is needed.
        contexts: where to measure; ascending.
        steps: tokens timed at each; the median counts.
        seconds: what may be spent in all. Contexts that would take longer are left out, but never the first.
    """
    began = time.perf_counter()
    readers = [_Reader(model, ids.flatten()) for model in (teacher, student)]
    rows: list[DecodeRow] = []
    skipped: list[int] = []
    growth = [0.0, 0.0]
    for number, context in enumerate(sorted(contexts)):
        deadline = math.inf if number == 0 else began + seconds
        if skipped or not all(reader.read_to(context, deadline) for reader in readers):
            skipped.append(context)
            continue
        held = [cache_bytes(reader.cache) for reader in readers]
        for reader in readers:
            reader.step()  # the first one after a prefill pays for it
        timed: list[tuple[float, ...]] = []
        while len(timed) < steps and (len(timed) < 3 or time.perf_counter() < began + seconds):
            timed.append(tuple(reader.step() for reader in readers))
        times = [1000 * median(column) for column in zip(*timed, strict=True)]
        growth = [
            (cache_bytes(reader.cache) - was) / (1 + len(timed)) for reader, was in zip(readers, held, strict=True)
        ]
        rows.append(
            DecodeRow(
                context=context,
                teacher_ms=times[0],
                student_ms=times[1],
                teacher_bytes=held[0],
                student_bytes=held[1],
            )
        )
    states = [layer_bytes(layer) for layer in readers[1].cache.layers if _is_state(layer)]
    return Decode(
        device=device_of(student).type,
        dtype=str(student.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        steps=steps,
        rows=rows,
        skipped=skipped,
        state_bytes=round(sum(states) / len(states)) if states else 0,
        teacher_bytes_per_token=growth[0],
        student_bytes_per_token=growth[1],
        smaller_from=smaller_from(rows[-1], growth[0], growth[1]),
        faster_from=faster_from(rows),
    )


def smaller_from(row: DecodeRow, teacher_growth: float, student_growth: float) -> int | None:
    """Return the context from which the student's cache is the smaller one, by straight lines through ``row``."""
    if teacher_growth <= student_growth:
        return None
    context = row.context + (row.student_bytes - row.teacher_bytes) / (teacher_growth - student_growth)
    return max(1, math.floor(context) + 1)


def faster_from(rows: Sequence[DecodeRow]) -> int | None:
    """Return the smallest measured context at which, and at all larger ones, the student is faster."""
    found = None
    for row in sorted(rows, key=lambda row: -row.context):
        if row.student_ms >= row.teacher_ms:
            break
        found = row.context
    return found
