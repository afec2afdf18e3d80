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
from compressor.errors import UserError
from compressor.hf.linear_attention import LinearAttention
from compressor.hf.linearized import attention_of
from compressor.mixers.spec import MEMORY, WHOLE, WINDOW, MixerSpec

CHECKED = 4
"""Batches that are kept out of training to measure on."""

STARTS = tuple(float(x) for x in range(4, -13, -1))
"""Logarithms of the memory's weight that are tried at first."""

SHARPNESS = (1.0, 0.3, 0.1)
"""Scales of the feature maps' first weights that are tried."""

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative error up to which an attention counts as the one that the frame computes."""


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


def put_attention(block: nn.Module, module: nn.Module) -> nn.Module:
    """Put an attention module in the place of the one that a block has, and return that one."""
    name, old = attention_of(block)
    setattr(block, name, module)
    return old


@contextmanager
def with_attention(block: nn.Module, module: nn.Module) -> Iterator[None]:
    """Let a block use another attention for a while."""
    old = put_attention(block, module)
    try:
        yield
    finally:
        put_attention(block, old)


@dataclass(frozen=True)
class _Example:
    """A call of the attention, and what the teacher answers (windows, T, D)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    answer: Tensor


@torch.no_grad()
def _example(runner: BlockRunner, block: int, stream: Stream, number: int, span: slice) -> _Example:
    """Run a loaded block up to its attention, and note with what that was called and what it gave."""
    attention = attention_of(runner.skeleton.blocks[block])[1]
    found: list[_Example] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        out = type(attention).forward(attention, *args, **kwargs)
        found.append(_Example(args, kwargs, out if isinstance(out, Tensor) else out[0]))
        raise _Reached

    with replaced_forwards([attention], [noting]):
        try:
            runner.forward(block, stream, number, span)
        except _Reached:
            return found[0]
    raise RuntimeError(f"block {block} does not call its attention")


def _error(student: nn.Module, example: _Example) -> Tensor:
    """Relative squared error of the student's answer, a scalar."""
    out = student(*example.args, **example.kwargs)[0]
    wanted = example.answer.float()
    error: Tensor = (out.float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
    return error


def _measured(student: LinearAttention, examples: list[_Example], parts: str) -> float:
    student.parts = parts
    with torch.no_grad():
        mean = sum(float(_error(student, example)) for example in examples) / len(examples)
    student.parts = WHOLE
    return mean


def check_attention(attention: nn.Module, example: _Example, layer: int) -> None:
    """Refuse an attention that is more than rotated queries, keys, values and a softmax.

    Raises:
        UserError: our frame, given a window over everything, computes something else.
    """
    tokens = example.answer.shape[1]
    plain = LinearAttention(attention, MixerSpec("check", tokens, 0, "window"), layer)
    error = _measured(plain, [example], WHOLE) ** 0.5
    if not error <= TOLERANCE[example.answer.dtype]:
        raise UserError(
            f"the attention of block {layer} ({type(attention).__name__}) has a feature that linearized layers do not "
            f"carry: with a window over the whole text they differ by {error:.2g} of its output",
            fix=f"--keep-layers {layer} leaves it as it is",
        )


@torch.no_grad()
def start_memory(student: LinearAttention, attention: nn.Module, example: _Example) -> None:
    """Let the memory begin, in each head, with the weight and the sharpness that help most before anything is learned.

    Where almost nothing is attended to beyond the window that is a weight of almost nothing; where old tokens all
    count alike it is a map that hardly tells them apart. Only where the published starting values are not wanted.
    """
    spec = student.spec
    if not hasattr(student, 'lin_mix') or spec.tied:
        return
    tokens = example.answer.shape[1]
    plain = LinearAttention(attention, MixerSpec("check", tokens, 0, "window"), student.layer_idx)
    wanted = plain.heads_of(*example.args, **example.kwargs).float()
    first_q, first_k = student.lin_q.weight.clone(), student.lin_k.weight.clone()
    errors = torch.zeros(len(SHARPNESS), len(STARTS), student.heads, device=wanted.device)
    for i, sharpness in enumerate(SHARPNESS):
        student.lin_q.weight.copy_(first_q * sharpness)
        student.lin_k.weight.copy_(first_k * sharpness)
        for j, start in enumerate(STARTS):
            student.lin_mix.fill_(start)
            given = student.heads_of(*example.args, **example.kwargs).float()
            errors[i, j] = (given - wanted).square().sum((0, 1, 3))
    least, weight = errors.min(1)  # (sharpness, H)
    shared = least.view(len(SHARPNESS), student.kv_heads, -1).sum(-1).argmin(0)  # (Hk): query heads of a key head agree
    chosen = shared.repeat_interleave(student.heads // student.kv_heads)
    scales = torch.tensor(SHARPNESS, device=wanted.device)
    student.lin_q.weight.copy_(first_q * scales[chosen, None, None])
    student.lin_k.weight.copy_(first_k * scales[shared, None, None])
    starts = torch.tensor(STARTS, device=wanted.device)
    student.lin_mix.copy_(starts[weight.gather(0, chosen[None])[0]])


def transfer_block(
    runner: BlockRunner,
    block: int,
    stream: Stream,
    spec: MixerSpec,
    lesson: Lesson,
    tick: Callable[[int, float], None] = lambda tokens, error: None,
) -> Transferred:
    """Train what is new in one loaded block; the block itself is left as it was.

    Args:
        stream: states of the training windows in front of the block.
        tick: told after every step how many tokens it has been, and the step's error.

    Raises:
        UserError: the block's attention is not what the frame computes, or training does not stay finite.
    """
    attention = attention_of(runner.skeleton.blocks[block])[1]
    batches = list(stream.batches())
    held = min(CHECKED, len(batches) // 8)
    checked = [_example(runner, block, stream, number, span) for number, span in batches[: held or 1]]
    check_attention(attention, checked[0], block)
    student = LinearAttention(attention, spec, block)
    for parameter in attention.parameters():
        parameter.requires_grad_(False)
    new = {name: p for name, p in student.named_parameters() if name.startswith("lin_")}
    start_memory(student, attention, checked[0])
    before = _measured(student, checked, WHOLE)
    curve: list[tuple[int, float]] = []
    if new:
        with torch.enable_grad():
            curve = _train(runner, block, stream, student, new, lesson, batches[held:], tick)
    alone = {parts: _measured(student, checked, parts) for parts in (MEMORY, WINDOW)}
    return Transferred(
        tensors={name: p.detach().float().cpu() for name, p in new.items()},
        before=before,
        after=_measured(student, checked, WHOLE),
        memory=alone[MEMORY] if spec.remembers else None,
        window=alone[WINDOW] if spec.window else None,
        curve=curve,
    )


def _train(
    runner: BlockRunner,
    block: int,
    stream: Stream,
    student: LinearAttention,
    new: dict[str, nn.Parameter],
    lesson: Lesson,
    batches: list[tuple[int, slice]],
    tick: Callable[[int, float], None],
) -> list[tuple[int, float]]:
    length = stream.ids.shape[1]
    micro = max(1, round(lesson.batch / stream.batch))  # batches of the stream in a step
    steps = max(1, round(lesson.tokens / (micro * stream.batch * length)))
    groups = [
        {"params": [p for name, p in new.items() if name.startswith("lin_decay") == gates], "lr": rate, "peak": rate}
        for gates, rate in ((False, lesson.rate), (True, lesson.gate_rate))
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), weight_decay=0.0)
    order = Order(len(batches), lesson.seed)
    mixed = student.spec.join in ("shared", "sum")
    curve, since, tokens = [], [], 0
    for step in range(steps):
        alone = mixed and order.chance(step) < lesson.memory_alone
        student.parts = MEMORY if alone else WHOLE
        total = 0.0
        for index in order.take(step * micro, micro):
            number, span = batches[index]
            example = _example(runner, block, stream, number, span)
            loss = _error(student, example) / micro
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
    student.parts = WHOLE
    return curve
