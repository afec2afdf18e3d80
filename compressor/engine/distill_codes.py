"""Learning the quantized weights of all blocks together, against the dense model's predictions (distillation).

(LLM-QAT, arXiv 2305.17888: the loss is that of the whole distribution, not of one token.)
Gradients go back with one block in memory at a time; the parameters, their gradients and moments stay in memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compressor.engine.backward import Objective, loss_backward
from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.skeleton import Linear
from compressor.engine.tensorfile import layout_of, read_header, read_tensor, write_file
from compressor.engine.tune import Learner, learned_weights, parted, steady

SAVED_EVERY = 300.0
"""Seconds after which the state is put on disk, besides at every judgement. What comes out does not depend on it."""

JUDGEMENTS = 10

Dense = Callable[[Tensor], Tensor]
"""Numbers of windows (B,) -> logits (B, length, vocabulary) fp32 of the dense model, on the device."""


@dataclass(frozen=True)
class Distilled:
    """What learning did.

    Attributes:
        curve: (step, mean divergence from the dense model in nats a token on windows not learned from), from step 0.
        step: at which the divergence was least; its parameters were kept.
    """

    curve: tuple[tuple[int, float], ...]
    step: int

    @property
    def before(self) -> float:
        """The divergence at the start."""
        return self.curve[0][1]

    @property
    def after(self) -> float:
        """The least divergence."""
        return min(loss for _, loss in self.curve)


def distill(
    runner: BlockRunner,
    stream: Stream,
    dense: Dense,
    learners: Mapping[str, tuple[Linear, Learner]],
    *,
    steps: int,
    rate: float,
    folder: Path,
    tick: Callable[[], Any] = lambda: None,
) -> Distilled:
    """Let all ``learners`` (linear name -> weight) learn together; each step sees one batch of the stream.

    The loss is KL(dense model || this one), the mean over all tokens. One batch of every eight is held out; on these
    the result is judged ten times, and the parameters that did best there are kept, those at the start included. Adam,
    the rate on a cosine to zero. On CPUs in one thread, for the same bits on any number.

    Args:
        stream: the windows as they enter the first block; it is left as it is.
        steps: how many batches to learn from; they are taken in turn.
        rate: of Adam, as a fraction of each parameter's own scale.
        folder: for the states of a pass, and for everything that going on after a kill needs: called again with the
            same arguments, learning goes on at the step that was saved last, to the same bits.
        tick: called after every step, those included that were done before a kill.
    """
    learned, held = parted(list(stream.batches()))
    every = max(1, steps // JUDGEMENTS)
    with steady(runner):
        state = _State([pair for _, one in learners.values() for pair in one.parameters()], rate, folder)
        if not state.load():
            state.judged(_judge(runner, stream, dense, learners, held))
        for _ in range(state.step):
            tick()
        saved = time.monotonic()
        while state.step < steps:
            batch = learned[state.step % len(learned)]
            state.begin(steps)
            part = _part(stream, [batch])
            loss_backward(
                runner,
                part,
                folder,
                weights=lambda block: _weights(runner, learners, block),
                objective=_divergence(dense, _windows(stream, [batch])),
            )
            state.end()
            due = state.step % every == 0 or state.step == steps
            if due:
                state.judged(_judge(runner, stream, dense, learners, held))
            if due or time.monotonic() - saved > SAVED_EVERY:
                state.save()
                saved = time.monotonic()
            tick()
        state.finish()
    return Distilled(tuple(state.curve), state.at)


class _State:
    """Parameters, moments, the best parameters so far, and the curve: everything that changes while learning."""

    def __init__(self, parameters: list[tuple[Tensor, float]], rate: float, folder: Path) -> None:
        self.tensors = [tensor.requires_grad_(True) for tensor, _ in parameters]
        self.rates = [rate * pace for _, pace in parameters]
        self.optimizer = torch.optim.Adam([{"params": [tensor]} for tensor in self.tensors], betas=(0.9, 0.95))
        self.kept = [tensor.detach().clone() for tensor in self.tensors]
        self.curve: list[tuple[int, float]] = []
        self.step = self.at = 0
        self.file = folder / "state.safetensors"

    def begin(self, steps: int) -> None:
        """Prepare for the gradients of the next step."""
        share = (1 + math.cos(math.pi * self.step / steps)) / 2
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.zero_grad()

    def end(self) -> None:
        """Take the step."""
        self.optimizer.step()
        self.step += 1

    def judged(self, loss: float) -> None:
        """Note how the present parameters do; keep them if none did better."""
        if self.curve and loss < min(known for _, known in self.curve):
            self.at = self.step
            self.kept = [tensor.detach().clone() for tensor in self.tensors]
        self.curve.append((self.step, loss))

    def finish(self) -> None:
        """Go back to the best parameters; they learn no more."""
        self.optimizer.zero_grad()
        for tensor, value in zip(self.tensors, self.kept, strict=True):
            tensor.requires_grad_(False).copy_(value)

    def save(self) -> None:
        """Put everything on disk in one step."""
        found = {
            "place": torch.tensor([self.step, self.at]),
            "curve": torch.tensor(self.curve, dtype=torch.float64),
        }
        for i, (tensor, kept) in enumerate(zip(self.tensors, self.kept, strict=True)):
            found |= {f"value.{i}": tensor.detach(), f"kept.{i}": kept}
            for name, moment in self.optimizer.state.get(tensor, {}).items():  # none where no token has come by
                found[f"{name}.{i}"] = moment
        write_file(self.file, layout_of(found.items()), found.__getitem__)

    def load(self) -> bool:
        """Take up what was saved; whether there was anything."""
        if not self.file.exists():
            return False
        entries = read_header(self.file)
        self.step, self.at = read_tensor(entries["place"]).tolist()
        self.curve = [(int(step), loss) for step, loss in read_tensor(entries["curve"]).tolist()]
        for i, tensor in enumerate(self.tensors):
            with torch.no_grad():
                tensor.copy_(read_tensor(entries[f"value.{i}"]))
            self.kept[i] = read_tensor(entries[f"kept.{i}"]).to(tensor.device)
            if f"step.{i}" in entries:
                moments = {name: read_tensor(entries[f"{name}.{i}"]) for name in ("step", "exp_avg", "exp_avg_sq")}
                steps = moments.pop("step")
                self.optimizer.state[tensor] = {
                    "step": steps,
                    **{name: moment.to(tensor.device) for name, moment in moments.items()},
                }
        return True


def _weights(runner: BlockRunner, learners: Mapping[str, tuple[Linear, Learner]], block: int) -> dict[str, Tensor]:
    return dict(learned_weights(runner, {name: pair for name, pair in learners.items() if pair[0].block == block}))


def _part(stream: Stream, batches: list[tuple[int, slice]]) -> Stream:
    """A stream of some batches only, with states of its own."""
    windows = _windows(stream, batches)
    calls = [stream.calls[number] for number, _ in batches]
    return Stream(stream.ids[windows], stream.states[windows], calls, stream.batch)


def _windows(stream: Stream, batches: list[tuple[int, slice]]) -> Tensor:
    return torch.cat([torch.arange(span.start, span.stop) for _, span in batches])


def _divergence(dense: Dense, windows: Tensor) -> Objective:
    """KL(dense model || logits), where the windows of a stream have the numbers ``windows`` for the dense model."""

    def objective(logits: Tensor, span: slice) -> tuple[Tensor, int]:
        with torch.no_grad():
            wanted = dense(windows[span]).log_softmax(-1)
        loss = F.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
        return loss, logits.shape[0] * logits.shape[1]

    return objective


@torch.no_grad()
def _judge(
    runner: BlockRunner,
    stream: Stream,
    dense: Dense,
    learners: Mapping[str, tuple[Linear, Learner]],
    batches: list[tuple[int, slice]],
) -> float:
    """Mean divergence on some batches."""
    part, objective = _part(stream, batches), _divergence(dense, _windows(stream, batches))
    for block in range(len(runner.skeleton.blocks)):
        runner.load_block(block)
        own = _weights(runner, learners, block)
        for number, span in part.batches():
            part.states[span] = runner.forward_with(block, part, number, span, own).cpu()
        runner.release_block(block)
    sums = [objective(runner.logits(part, span), span) for _, span in part.batches()]
    return sum(float(loss) for loss, _ in sums) / sum(tokens for _, tokens in sums)
