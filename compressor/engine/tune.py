"""Learning the quantized weights of a block together, against what the block gave before (block reconstruction).

(FlexRound, arXiv 2306.00317, section 3; BRECQ, arXiv 2102.05426.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.skeleton import Linear
from compressor.formats.representation import Representation
from compressor.methods.threads import one_thread

HELD_OUT = 8  # every so many batches, one is not learned from but judged on


class Learner(Protocol):
    """A quantized weight whose parameters can be learned."""

    def parameters(self) -> list[tuple[Tensor, float]]:
        """Leaf tensors, fp32, and for each how fast it learns relative to the common rate."""
        ...

    def weight(self) -> Tensor:
        """The quantized weight (m, n) fp32, differentiable with respect to the parameters (straight through)."""
        ...

    def finish(self) -> Representation:
        """The code at the present parameters."""
        ...


@dataclass(frozen=True)
class Tuned:
    """What tuning did: mean squared error of the block's output relative to its power, on batches not learned from."""

    before: float
    after: float
    step: int


def tune(
    runner: BlockRunner,
    block: int,
    stream: Stream,
    targets: Tensor,
    learners: Mapping[str, tuple[Linear, Learner]],
    *,
    steps: int,
    rate: float,
) -> Tuned:
    """Let ``learners`` (linear name -> weight) learn together; each step sees one batch of the stream.

    The loss is the squared error of the block's output on the stream's states against ``targets`` (windows, length,
    width). One batch of every eight is held out; on these the result is judged again and again, and the parameters that
    did best there are kept, those at the start included. Adam, the rate on a cosine to zero. On CPUs in one thread, for
    the same bits on any number.

    Args:
        targets: what the block gave before it was quantized, in the order of the stream's windows, on the CPU.
        steps: how many batches to learn from; they are taken in turn.
        rate: of Adam, as a fraction of each parameter's own scale.
    """
    learned, held = parted(list(stream.batches()))
    groups = [
        {"params": [tensor], "lr": rate * pace} for _, one in learners.values() for tensor, pace in one.parameters()
    ]
    tensors = [tensor for group in groups for tensor in group["params"]]  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    every = max(1, steps // 10)
    with steady(runner):
        best = before = _judge(runner, block, stream, targets, learners, held)
        kept, at = [tensor.detach().clone() for tensor in tensors], 0
        for step in range(1, steps + 1):
            with torch.enable_grad():
                for tensor in tensors:
                    tensor.requires_grad_(True)
                number, span = learned[(step - 1) % len(learned)]
                error, power = _loss(runner, block, stream, targets, learners, number, span)
                optimizer.zero_grad()
                (error / power).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if step % every == 0 or step == steps:
                now = _judge(runner, block, stream, targets, learners, held)
                if now < best:
                    best, at = now, step
                    kept = [tensor.detach().clone() for tensor in tensors]
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.requires_grad_(False).copy_(value)
    return Tuned(before, best, at)


def parted(batches: list[tuple[int, slice]]) -> tuple[list[tuple[int, slice]], list[tuple[int, slice]]]:
    """The batches that are learned from, and those that are held out; a single one is both."""
    held = batches[HELD_OUT - 1 :: HELD_OUT] or batches[-1:]
    return [batch for batch in batches if batch not in held] or batches, held


def steady(runner: BlockRunner) -> AbstractContextManager[None]:
    """One thread on CPUs."""
    return one_thread() if runner.device.type == "cpu" else nullcontext()


@torch.no_grad()
def _judge(
    runner: BlockRunner,
    block: int,
    stream: Stream,
    targets: Tensor,
    learners: Mapping[str, tuple[Linear, Learner]],
    batches: list[tuple[int, slice]],
) -> float:
    sums = [_loss(runner, block, stream, targets, learners, number, span) for number, span in batches]
    return sum(float(error) for error, _ in sums) / max(sum(float(power) for _, power in sums), 1e-30)


def _loss(
    runner: BlockRunner,
    block: int,
    stream: Stream,
    targets: Tensor,
    learners: Mapping[str, tuple[Linear, Learner]],
    number: int,
    span: slice,
) -> tuple[Tensor, Tensor]:
    """Squared error of one batch, and the power of what the block adds: the residual stream passes through anyway."""
    wanted = targets[span].to(runner.device, torch.float32)
    out = runner.forward_with(block, stream, number, span, dict(learned_weights(runner, learners)))
    added = wanted - stream.states[span].to(runner.device, torch.float32)
    return (out.float() - wanted).square().sum(), added.square().sum()


def learned_weights(
    runner: BlockRunner, learners: Mapping[str, tuple[Linear, Learner]]
) -> Iterator[tuple[str, Tensor]]:
    """Module tensor names and the weights that stand for them, as modules hold them; differentiable."""
    for name, (linear, learner) in learners.items():
        weight = learner.weight().to(runner.dtype)
        yield f"{name}.weight", weight.T if linear.transposed else weight
