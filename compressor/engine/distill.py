"""End-to-end distillation: the linearized model learns to predict what the dense one predicts.

KL divergence to the dense model's distribution, averaged over tokens, and a little cross entropy to the text itself.
Parameters that are trained are fp32 masters; on accelerators products are computed in bf16. Runs in one process, or in
as many as ``accelerate launch`` starts: a step is the same windows either way, shared out. Models may be sharded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from compressor.engine.lora import LoraLinear
from compressor.engine.schedule import Order, cosine
from compressor.engine.sharding import is_sharded, load_optimizer, optimizer_state, part_of, whole
from compressor.engine.teacher_logits import TopLogits, largest
from compressor.errors import UserError

LOGITS_AT_ONCE = 1 << 23
"""Elements of a logit tensor (windows x tokens x vocabulary) that are held together."""

Kind = Literal["old", "new", "gate"]
"""A parameter: of the dense model too, new in a linearized layer, or one of its decays."""

SAVE_EVERY = 120.0
"""Seconds between two checkpoints."""

Teacher = Callable[[Sequence[int], Tensor], Tensor | TopLogits]
"""Numbers of windows and their ids (windows, length) -> what the dense model predicts: logits, or the largest."""


@dataclass(frozen=True)
class Leg:
    """A part of the course: windows of one length.

    Attributes:
        ids: (windows, length) int64.
        teacher: knows what the dense model predicts for these windows.
        tokens: to train on, in all, over all processes.
        batch: windows in a step, over all processes.
        pace: learning rates, as a share of the course's.
    """

    ids: Tensor
    teacher: Teacher
    tokens: int
    batch: int
    pace: float = 1.0

    @property
    def step_tokens(self) -> int:
        """Tokens in a step."""
        return self.batch * self.ids.shape[1]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return max(1, round(self.tokens / self.step_tokens))


@dataclass(frozen=True)
class Course:
    """How the model is trained, whatever the windows.

    Attributes:
        rate: learning rate of low-rank updates, or of all weights that the dense model has too.
        new_rate: that of what is new in linearized layers, but for its decays.
        gate_rate: that of the decays.
        cross_entropy: weight of the text itself.
        top_k: how many logits of the dense model count one by one; 0: all.
        seed: of the order of windows.
    """

    rate: float
    new_rate: float
    gate_rate: float
    cross_entropy: float
    top_k: int
    seed: int


@dataclass(frozen=True)
class Distilled:
    """What came of it.

    Attributes:
        curve: (tokens trained on, mean KL, mean cross entropy since the last entry), nats per token.
        resumed: steps taken over from an interrupted run.
        ends: tokens trained on at the end of each leg.
    """

    curve: list[tuple[int, float, float]]
    resumed: int
    ends: list[int]


def soft_loss(wanted: Tensor | TopLogits, given: Tensor, top_k: int) -> Tensor:
    """Sum over tokens of KL(dense || linearized), nats.

    Args:
        wanted: logits (..., V), or the largest predictions.
        given: logits (..., V).
        top_k: the V - top_k smallest of ``wanted`` count as one outcome; 0: every outcome counts.
    """
    log_q = given.float().log_softmax(-1)
    if isinstance(wanted, Tensor):
        if not 0 < top_k < wanted.shape[-1]:
            log_p = wanted.float().log_softmax(-1)
            return (log_p.exp() * (log_p - log_q)).sum()
        wanted = largest(wanted, top_k)
    log_p, log_q = wanted.logs, log_q.gather(-1, wanted.chosen)
    if log_p.shape[-1] < given.shape[-1]:
        log_p, log_q = (torch.cat([x, _rest(x)], -1) for x in (log_p, log_q))
    return (log_p.exp() * (log_p - log_q)).sum()


def _rest(logs: Tensor) -> Tensor:
    """Logarithm of what is left to one, (..., 1)."""
    return torch.log1p(-logs.exp().sum(-1, keepdim=True).clamp_max(1 - 1e-6))


def own_kind(name: str) -> Kind:
    """What a parameter of a model with linearized layers of our own is."""
    return ("gate" if ".lin_decay." in name else "new") if ".lin_" in name else "old"


def trainable(student: nn.Module, course: Course, kind: Callable[[str], Kind]) -> list[dict[str, Any]]:
    """Groups of parameters that are trained, each with its peak learning rate; marks them, and no others, to be
    trained.

    Args:
        kind: of a parameter, by its name; low-rank updates count as old.
    """
    rates = {"old": course.rate, "new": course.new_rate, "gate": course.gate_rate}
    groups: dict[float, list[nn.Parameter]] = {}
    lora = any(isinstance(module, LoraLinear) for module in student.modules())
    for name, parameter in student.named_parameters():
        found = kind(name)
        wanted = found != "old" or not lora or ".lora_" in name
        parameter.requires_grad_(wanted)
        if wanted:
            groups.setdefault(rates[found], []).append(parameter)
    return [{"params": parameters, "lr": rate, "peak": rate} for rate, parameters in sorted(groups.items())]


def asking(dense: Any, accelerator: Any) -> Teacher:
    """The dense model itself as the teacher, on the device of the process."""

    def predict(windows: Sequence[int], ids: Tensor) -> Tensor:
        with torch.no_grad(), accelerator.autocast():
            logits: Tensor = dense(input_ids=ids, use_cache=False).logits
        return logits

    return predict


def distill(
    student: nn.Module,
    legs: Sequence[Leg],
    course: Course,
    accelerator: Any,
    checkpoint: Path,
    tick: Callable[[int, int, int, float], None] = lambda step, steps, tokens, loss: None,
    kind: Callable[[str], Kind] = own_kind,
) -> Distilled:
    """Train ``student`` in place, on one leg of the course after the other.

    The optimizer goes on from leg to leg, and so do its moments; rates rise and fall anew in each.

    Args:
        accelerator: of accelerate.
        checkpoint: file that the run can go on from, in whichever leg it was; written by the first process.
        tick: told after every step its number, how many there are, the tokens so far, and its loss.
        kind: of a parameter of the student, by its name.

    Raises:
        UserError: windows cannot be shared out evenly, or training does not stay finite.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    for leg in legs:
        if leg.batch % world:
            raise UserError(f"steps of {leg.batch} windows cannot be shared by {world} processes", fix="--batch")
    groups = trainable(student, course, kind)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    student.train()
    sharded = is_sharded(student)
    model, optimizer = (student, optimizer) if sharded else accelerator.prepare(student, optimizer)
    curve, first, sums = _resume(checkpoint, student, optimizer)
    steps, step, tokens, saved = sum(leg.steps for leg in legs), 0, 0, time.monotonic()
    for number, leg in enumerate(legs):
        order, own = Order(len(leg.ids), course.seed + number), leg.batch // world
        for at in range(leg.steps):
            step, tokens = step + 1, tokens + leg.step_tokens
            if step <= first:
                continue
            last = at + 1 == leg.steps
            found = _step(leg, model, order.take(at * leg.batch + rank * own, own), course, accelerator)
            due = accelerator.is_main_process and (last or time.monotonic() - saved > SAVE_EVERY)
            found = accelerator.reduce(torch.cat([found, found.new_tensor([due])]), "sum")
            accelerator.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * leg.pace * cosine(at, leg.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            kl, ce = (found[:2] / leg.step_tokens).tolist()
            if not kl < float("inf"):
                raise UserError(f"distillation does not stay finite (step {step} of {steps})", fix="lower the rates")
            sums = [*sums, (kl, ce)]
            if last or (at + 1) % max(1, leg.steps // 100) == 0:
                means = [sum(column) / len(sums) for column in zip(*sums, strict=True)]
                curve, sums = [*curve, (tokens, means[0], means[1])], []
            tick(step, steps, tokens, kl)
            if found[2] and (accelerator.is_main_process or sharded):
                _save(checkpoint, student, optimizer, curve, step, sums, write=accelerator.is_main_process)
                saved = time.monotonic()
    student.eval()
    return Distilled(curve, first, list(accumulate(leg.steps * leg.step_tokens for leg in legs)))


def _step(leg: Leg, model: Any, windows: Sequence[int], course: Course, accelerator: Any) -> Tensor:
    """Forward and backward of this process's windows; sums of KL and cross entropy over their tokens, (2,)."""
    device = accelerator.device
    vocabulary = accelerator.unwrap_model(model).config.get_text_config().vocab_size
    micro = max(1, LOGITS_AT_ONCE // (leg.ids.shape[1] * vocabulary))
    total = torch.zeros(2, device=device)
    for start in range(0, len(windows), micro):
        chosen = windows[start : start + micro]
        part = leg.ids[chosen].to(device)
        wanted = leg.teacher(chosen, part)
        last = start + micro >= len(windows)
        with accelerator.no_sync(model) if not last else nullcontext():
            with accelerator.autocast():
                given = model(input_ids=part, use_cache=False).logits
            kl = soft_loss(wanted, given, course.top_k)
            ce = cross_entropy(given[:, :-1].float().flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            # processes average their gradients, and each holds only its share of the step's tokens
            loss = (kl + course.cross_entropy * ce) / leg.step_tokens * accelerator.num_processes
            accelerator.backward(loss)
        total += torch.stack([kl.detach(), ce.detach()])
    return total


def _trained(student: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def _save(
    file: Path,
    student: nn.Module,
    optimizer: Any,
    curve: list[tuple[int, float, float]],
    step: int,
    sums: list[tuple[float, float]],
    *,
    write: bool,
) -> None:
    """Save where training stands. Processes that hold parts of the model all call this, and one of them writes."""
    state = {
        "step": step,
        "curve": curve,
        "sums": sums,
        "weights": {name: whole(p.detach()).cpu() for name, p in _trained(student).items()},
        "optimizer": optimizer_state(optimizer),
    }
    if not write:
        return
    temporary = file.with_name(file.name + ".tmp")
    torch.save(state, temporary)
    temporary.replace(file)


def _resume(
    file: Path, student: nn.Module, optimizer: Any
) -> tuple[list[tuple[int, float, float]], int, list[tuple[float, float]]]:
    """Take up what an interrupted run has left."""
    if not file.exists():
        return [], 0, []
    state = torch.load(file, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, parameter in _trained(student).items():
            parameter.copy_(part_of(state["weights"][name], parameter))
    load_optimizer(optimizer, state["optimizer"])
    return [tuple(entry) for entry in state["curve"]], state["step"], [tuple(pair) for pair in state["sums"]]
