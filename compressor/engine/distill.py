"""End-to-end distillation: the linearized model learns to predict what the dense one predicts.

KL divergence to the dense model's distribution, averaged over tokens, and a little cross entropy to the text itself.
Parameters that are trained are fp32 masters; on accelerators products are computed in bf16. Runs in one process, or in
as many as ``accelerate launch`` starts: a step is the same windows either way, shared out. Models may be sharded."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from compressor.engine.lora import LoraLinear
from compressor.engine.schedule import Order, cosine
from compressor.engine.sharding import is_sharded, load_optimizer, optimizer_state, part_of, whole
from compressor.errors import UserError

LOGITS_AT_ONCE = 1 << 23
"""Elements of a logit tensor (windows x tokens x vocabulary) that are held together."""

Kind = Literal["old", "new", "gate"]
"""A parameter: of the dense model too, new in a linearized layer, or one of its decays."""

SAVE_EVERY = 120.0
"""Seconds between two checkpoints."""


@dataclass(frozen=True)
class Course:
    """How the model is trained.

    Attributes:
        tokens: to train on, in all, over all processes.
        batch: windows in a step, over all processes.
        rate: learning rate of low-rank updates, or of all weights that the dense model has too.
        new_rate: that of what is new in linearized layers, but for its decays.
        gate_rate: that of the decays.
        cross_entropy: weight of the text itself.
        top_k: how many logits of the dense model count one by one; 0: all.
        seed: of the order of windows.
    """

    tokens: int
    batch: int
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
    """

    curve: list[tuple[int, float, float]]
    resumed: int


def soft_loss(wanted: Tensor, given: Tensor, top_k: int) -> Tensor:
    """Sum over tokens of KL(dense || linearized), nats.

    Args:
        wanted, given: logits (..., V).
        top_k: the V - top_k smallest of ``wanted`` count as one outcome; 0: every outcome counts.
    """
    log_p, log_q = wanted.float().log_softmax(-1), given.float().log_softmax(-1)
    if 0 < top_k < wanted.shape[-1]:
        log_p, chosen = log_p.topk(top_k, -1)
        log_q = log_q.gather(-1, chosen)
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


def distill(
    dense: nn.Module,
    student: nn.Module,
    ids: Tensor,
    course: Course,
    accelerator: Any,
    checkpoint: Path,
    tick: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    kind: Callable[[str], Kind] = own_kind,
) -> Distilled:
    """Train ``student`` in place.

    Args:
        dense: the model to learn from, on the device of the process; sharded where ``student`` is.
        ids: (windows, length) int64.
        accelerator: of accelerate.
        checkpoint: file that the run can go on from; written by the first process.
        tick: told after every step.
        kind: of a parameter of the student, by its name.

    Raises:
        UserError: windows cannot be shared out evenly, or training does not stay finite.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    if course.batch % world:
        raise UserError(f"steps of {course.batch} windows cannot be shared by {world} processes", fix="--batch")
    own = course.batch // world
    groups = trainable(student, course, kind)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    student.train()
    sharded = is_sharded(student)
    model, optimizer = (student, optimizer) if sharded else accelerator.prepare(student, optimizer)
    steps = max(1, round(course.tokens / (course.batch * ids.shape[1])))
    curve, first, sums = _resume(checkpoint, student, optimizer)
    order, saved = Order(len(ids), course.seed), time.monotonic()
    for step in range(first, steps):
        chosen = order.take(step * course.batch + rank * own, own)
        found = _step(dense, model, ids[chosen], course, accelerator)
        due = accelerator.is_main_process and (step + 1 == steps or time.monotonic() - saved > SAVE_EVERY)
        found = accelerator.reduce(torch.cat([found, found.new_tensor([due])]), "sum")
        accelerator.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * cosine(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kl, ce = (found[:2] / course.batch / ids.shape[1]).tolist()
        if not kl < float("inf"):
            raise UserError(f"distillation does not stay finite (step {step + 1} of {steps})", fix="lower the rates")
        sums = [*sums, (kl, ce)]
        if step + 1 == steps or (step + 1) % max(1, steps // 100) == 0:
            means = [sum(column) / len(sums) for column in zip(*sums, strict=True)]
            curve, sums = [*curve, ((step + 1) * course.batch * ids.shape[1], means[0], means[1])], []
        tick(step + 1, steps, kl)
        if found[2] and (accelerator.is_main_process or sharded):
            _save(checkpoint, student, optimizer, curve, step + 1, sums, write=accelerator.is_main_process)
            saved = time.monotonic()
    student.eval()
    return Distilled(curve, first)


def _step(dense: Any, model: Any, ids: Tensor, course: Course, accelerator: Any) -> Tensor:
    """Forward and backward of this process's windows; sums of KL and cross entropy over their tokens, (2,)."""
    device = accelerator.device
    vocabulary = dense.config.get_text_config().vocab_size
    micro = max(1, LOGITS_AT_ONCE // (ids.shape[1] * vocabulary))
    tokens = course.batch * ids.shape[1]
    total = torch.zeros(2, device=device)
    parts = torch.split(ids, micro)
    for number, part in enumerate(parts):
        part = part.to(device)
        with torch.no_grad(), accelerator.autocast():
            wanted = dense(input_ids=part, use_cache=False).logits
        last = number == len(parts) - 1
        with accelerator.no_sync(model) if not last else nullcontext():
            with accelerator.autocast():
                given = model(input_ids=part, use_cache=False).logits
            kl = soft_loss(wanted, given, course.top_k)
            ce = cross_entropy(given[:, :-1].float().flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            # processes average their gradients, and each holds only its share of the step's tokens
            loss = (kl + course.cross_entropy * ce) / tokens * accelerator.num_processes
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
