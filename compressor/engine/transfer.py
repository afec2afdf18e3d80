"""Attention transfer: the memory of one block learns to give what the block's softmax attention gives.

The teacher's states flow on unchanged, so that every block is trained on the inputs it has in the teacher, alone and
in any order, with one block in memory (LoLCATs, arXiv 2410.10254, section 3.1; the relative error after the output
projection is RADLADS' target, arXiv 2505.03005)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.engine.forward import BlockRunner, Stream, replaced_forwards
from compressor.engine.schedule import Order, cosine
from compressor.engine.students import Example, Students, relative_error
from compressor.errors import UserError
from compressor.hf.linearized import attention_of
from compressor.mixers.spec import MEMORY, WHOLE, WINDOW

CHECKED = 4
"""Batches that are kept out of training to measure on, of at least eight times as many; of fewer, one in eight, and
below eight none: the first is then measured on although it was trained on."""


@dataclass(frozen=True)
class Lesson:
    """How a block is trained.

    Attributes:
        tokens: to train on, in all.
        batch: windows in a step.
        rate: learning rate of what is new, but for the decays.
        gate_rate: that of the decays.
        memory_alone: share of steps in which the memory works without a window.
        seed: of the order of windows.
    """

    tokens: int
    batch: int
    rate: float
    gate_rate: float
    memory_alone: float
    seed: int


@dataclass(frozen=True)
class Transferred:
    """What came of a block.

    Attributes:
        tensors: new parameters by name, relative to the attention module, fp32.
        before: relative squared error of the attention's output on windows that are not trained on, at the start.
        after: the same after training.
        memory: the same with the memory alone; None where there is none.
        window: the same with the window alone; None where there is none.
        curve: (tokens trained on, mean relative error of the training steps since the last entry).
    """

    tensors: dict[str, Tensor]
    before: float
    after: float
    memory: float | None
    window: float | None
    curve: list[tuple[int, float]]


class _Reached(Exception):  # noqa: N818  # not an error
    """Leaves a block behind its attention."""


@contextmanager
def with_attention(block: nn.Module, module: nn.Module) -> Iterator[None]:
    """Let a block use another module in the place of its attention for a while."""
    name, own = attention_of(block)
    setattr(block, name, module)
    try:
        yield
    finally:
        setattr(block, name, own)


@torch.no_grad()
def _example(runner: BlockRunner, block: int, stream: Stream, number: int, span: slice) -> Example:
    """Run a loaded block up to its attention, and note with what that was called and what it gave."""
    attention = attention_of(runner.skeleton.blocks[block])[1]
    found: list[Example] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        out = type(attention).forward(attention, *args, **kwargs)
        found.append(Example(args, kwargs, out if isinstance(out, Tensor) else out[0]))
        raise _Reached

    with replaced_forwards([attention], [noting]):
        try:
            runner.forward(block, stream, number, span)
        except _Reached:
            return found[0]
    raise RuntimeError(f"block {block} does not call its attention")


def _measured(students: Students, student: nn.Module, examples: list[Example], parts: str) -> float:
    students.use(student, parts)
    with torch.no_grad():
        mean = sum(float(relative_error(student, example)) for example in examples) / len(examples)
    students.use(student, WHOLE)
    return mean


def transfer_block(
    runner: BlockRunner,
    block: int,
    stream: Stream,
    students: Students,
    lesson: Lesson,
    tick: Callable[[int, float], None] = lambda tokens, error: None,
) -> Transferred:
    """Train what is new in one loaded block; the block itself is left as it was. Training that ends worse than it began
    is forgotten.

    Args:
        stream: states of the training windows in front of the block.
        students: the kind that takes the attention's place.
        tick: told after every step how many tokens it has been, and the step's error.

    Raises:
        UserError: the block's attention is not what such a student can replace, or training does not stay finite.
    """
    attention = attention_of(runner.skeleton.blocks[block])[1]
    batches = list(stream.batches())
    held = min(CHECKED, len(batches) // 8)
    checked = [_example(runner, block, stream, number, span) for number, span in batches[: held or 1]]
    seen = -(-students.fitted // (stream.batch * stream.ids.shape[1]))
    fitted = [_example(runner, block, stream, number, span) for number, span in batches[held : held + seen]]
    student = students.make(attention, block)
    for parameter in attention.parameters():
        parameter.requires_grad_(False)
    students.start(student, attention, fitted or checked)
    new = students.new(student)
    before = _measured(students, student, checked, WHOLE)
    after, curve = before, list[tuple[int, float]]()
    if new:
        begun = {name: p.detach().clone() for name, p in new.items()}
        with torch.enable_grad():
            curve = _train(runner, block, stream, students, student, lesson, batches[held:], tick)
        after = _measured(students, student, checked, WHOLE)
        if not after <= before:  # an attention that gives next to nothing is soon overshot
            students.take(student, begun)
            after = before
    alone = {parts: _measured(students, student, checked, parts) for parts in students.parts}
    return Transferred(
        tensors={name: p.detach().float().cpu() for name, p in new.items()},
        before=before,
        after=after,
        memory=alone.get(MEMORY),
        window=alone.get(WINDOW),
        curve=curve,
    )


def _train(
    runner: BlockRunner,
    block: int,
    stream: Stream,
    students: Students,
    student: nn.Module,
    lesson: Lesson,
    batches: list[tuple[int, slice]],
    tick: Callable[[int, float], None],
) -> list[tuple[int, float]]:
    length = stream.ids.shape[1]
    micro = max(1, round(lesson.batch / stream.batch))  # batches of the stream in a step
    steps = max(1, round(lesson.tokens / (micro * stream.batch * length)))
    new = students.new(student)
    groups = [
        {"params": [p for name, p in new.items() if students.is_gate(name) == gates], "lr": rate, "peak": rate}
        for gates, rate in ((False, lesson.rate), (True, lesson.gate_rate))
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), weight_decay=0.0)
    order = Order(len(batches), lesson.seed)
    curve, since, tokens = [], [], 0
    for step in range(steps):
        alone = students.mixed and order.chance(step) < lesson.memory_alone
        students.use(student, MEMORY if alone else WHOLE)
        total = 0.0
        for index in order.take(step * micro, micro):
            number, span = batches[index]
            example = _example(runner, block, stream, number, span)
            loss = relative_error(student, example) / micro
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            tokens += example.answer.shape[0] * length
        if not total < float("inf"):
            raise UserError(
                f"attention transfer of block {block} does not stay finite (step {step + 1})", fix="lower --rate"
            )
        torch.nn.utils.clip_grad_norm_(new.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * cosine(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not alone:
            since.append(total)
        tick(tokens, total)
        if since and (step + 1 == steps or (step + 1) % max(1, steps // 50) == 0):
            curve.append((tokens, sum(since) / len(since)))
            since = []
    students.use(student, WHOLE)
    return curve
