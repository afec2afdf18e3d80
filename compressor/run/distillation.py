"""End-to-end training of a linearized model, in the process that runs it and in those that help it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.engine.distill import Course, Distilled, Leg, Teacher, asking, distill
from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.journal import read_journal
from compressor.engine.lora import add_lora
from compressor.engine.output import working_folder
from compressor.engine.processes import make_accelerator
from compressor.engine.sharding import shard, sharding_asked, unseen
from compressor.engine.teacher_logits import StoredTeacher, store_logits
from compressor.methods.linearize_settings import LinearizeSettings
from compressor.run.inputs import Inputs, load_inputs
from compressor.run.linear_models import load_dense, trained_tensors
from compressor.run.linear_target import target_of
from compressor.run.plan import Plan
from compressor.run.progress import quiet
from compressor.run.rounds import help_teaching
from compressor.run.session import Options

CHECKPOINT = "distill.pt"
LOGITS = ("logits.safetensors", "logits-long.safetensors")
"""Predictions of the dense model in the working folder, for each leg of the course."""


def course_of(settings: LinearizeSettings, seed: int) -> Course:
    """How the settings want the whole model to be trained."""
    return Course(
        rate=settings.lora_rate if settings.trained == "lora" else settings.full_rate,
        new_rate=settings.new_rate,
        gate_rate=settings.gate_rate,
        cross_entropy=settings.cross_entropy,
        top_k=settings.top_k,
        seed=seed + 1,
    )


def train_student(
    plan: Plan,
    options: Options,
    layers: Sequence[int],
    inputs: Inputs,
    work: Path,
    accelerator: Any,
    tick: Callable[[int, int, int, float], None] = lambda step, steps, tokens, loss: None,
) -> tuple[Distilled, dict[str, Tensor], int]:
    """Load what training needs and train the linearized model. Every process of the run calls this, with the same
    arguments.

    Args:
        layers: those that are linearized.
        work: the working folder, with what attention transfer has left, and the dense model's predictions where these
            are stored.

    Returns:
        The course that it took, the tensors it has changed, and how many parameters were trained.
    """
    stage = plan.recipe.stages[0]
    settings, seed = stage.settings, plan.recipe.calibration.seed
    assert isinstance(settings, LinearizeSettings)
    low_rank, stored = settings.trained == "lora", settings.store_logits
    sharded = sharding_asked() and accelerator.num_processes > 1
    device = torch.device("cpu") if sharded else accelerator.device  # sharding moves block by block
    target, dense = target_of(stage, plan.skeleton), None
    with unseen():
        if not (stored and target.trains_written):
            dense = load_dense(plan.skeleton, torch.float32, device, trust_remote_code=options.trust_remote_code)
        student = target.student(dense, layers, work, device, share=low_rank or stored)
    updates = add_lora(student, target.updated(student, layers), settings.rank, seed) if low_rank else {}
    if settings.gradient_checkpointing:
        older = not hasattr(student, "activation_checkpointing_enable")  # transformers before 5.23
        enable = student.gradient_checkpointing_enable if older else student.activation_checkpointing_enable
        enable()
    asked = () if stored else (dense,)
    for model in (*asked, student) if sharded else ():
        shard(model, plan.skeleton.block_names, accelerator.device)
    at = accelerator.device
    teachers = [StoredTeacher(work / name, at) if stored else asking(dense, accelerator) for name in used(plan)]
    del dense, asked  # whoever asks it holds it
    with torch.enable_grad():
        legs, course = legs_of(plan, inputs, teachers), course_of(settings, seed)
        found = distill(student, legs, course, accelerator, work / CHECKPOINT, tick, target.kind)
    count = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return found, trained_tensors(student, updates), count


def used(plan: Plan) -> tuple[str, ...]:
    """Those of :data:`LOGITS` that belong to a leg of this run's course."""
    return LOGITS[: 2 if plan.longer else 1]


def legs_of(plan: Plan, inputs: Inputs, teachers: Sequence[Teacher]) -> list[Leg]:
    """The calibration windows, and the longer ones after them where there is a third stage."""
    settings, longer = plan.recipe.stages[0].settings, plan.longer
    assert isinstance(settings, LinearizeSettings) and inputs.calibration is not None
    legs = [Leg(inputs.calibration.ids, teachers[0], settings.stages[1], settings.batch)]
    if longer is not None and inputs.longer is not None:
        legs.append(Leg(inputs.longer.ids, teachers[1], longer.tokens, longer.batch, settings.long_rate))
    return legs


def store_predictions(
    plan: Plan, runner: BlockRunner, passed: Stream, inputs: Inputs, work: Path, tick: Callable[[int], None]
) -> int:
    """Put the dense model's predictions in the working folder, where they are not there already; return their bytes.

    Args:
        runner: with what is outside the blocks of the dense model.
        passed: the calibration windows behind its last block.
        tick: told the tokens of every window whose predictions have been written.
    """
    settings = plan.recipe.stages[0].settings
    assert isinstance(settings, LinearizeSettings)
    for name in used(plan):
        file, stream = work / name, passed
        if file.exists():
            continue
        if name != LOGITS[0]:
            assert inputs.longer is not None
            stream = runner.start(inputs.longer.ids)
            runner.run(stream)
        store_logits(file, runner, stream, settings.top_k, tick)
    return sum((work / name).stat().st_size for name in used(plan))


def assist(plan: Plan, model: str, options: Options) -> None:
    """What every process but the first does: teach its share of the blocks, and train the whole model with all."""
    settings = plan.recipe.stages[0].settings
    assert isinstance(settings, LinearizeSettings)
    accelerator = make_accelerator(plan.device)
    inputs = load_inputs(plan, model, options.trust_remote_code, quiet())
    work = working_folder(options.output)
    accelerator.wait_for_everyone()  # the journal is open
    help_teaching(plan, inputs, work, accelerator)
    if settings.trained == "none":
        return
    accelerator.wait_for_everyone()  # layers are chosen
    facts = read_journal(work).facts
    if "distilled" not in facts:
        layers = [layer for layer in range(len(plan.skeleton.blocks)) if layer not in facts["kept"]]
        train_student(plan, options, layers, inputs, work, accelerator)
    accelerator.end_training()


def stopwatch(advance: Callable[[int], None], now: Callable[[str], None]) -> Any:
    """A ``tick`` that says how far training is and how fast it goes; of a run that goes on, from there."""
    reached, began, clock = 0, 0, 0.0

    def tick(step: int, steps: int, tokens: int, loss: float) -> None:
        nonlocal reached, began, clock
        if not began:
            began, clock = tokens, time.perf_counter()
        elapsed = time.perf_counter() - clock
        speed = f", {(tokens - began) / elapsed:.0f} tokens/s" if tokens > began else ""
        now(f"step {step} of {steps}: KL {loss:.3g}{speed}")
        advance(tokens - reached)
        reached = tokens

    return tick
