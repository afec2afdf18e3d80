"""End-to-end training of a linearized model, in the process that runs it and in those that help it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.engine.distill import Course, Distilled, distill
from compressor.engine.journal import read_journal
from compressor.engine.lora import add_lora
from compressor.engine.output import working_folder
from compressor.engine.processes import make_accelerator
from compressor.engine.sharding import shard, sharding_asked, unseen
from compressor.methods.linearize_settings import LinearizeSettings
from compressor.run.inputs import load_inputs
from compressor.run.linear_models import load_dense, trained_tensors
from compressor.run.linear_target import target_of
from compressor.run.plan import Plan
from compressor.run.progress import quiet
from compressor.run.rounds import help_teaching
from compressor.run.session import Options

CHECKPOINT = "distill.pt"


def course_of(settings: LinearizeSettings, seed: int) -> Course:
    """How the settings want the whole model to be trained."""
    return Course(
        tokens=settings.stages[1],
        batch=settings.batch,
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
    ids: Tensor,
    work: Path,
    accelerator: Any,
    tick: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> tuple[Distilled, dict[str, Tensor], int]:
    """Load both models and train the linearized one. Every process of the run calls this, with the same arguments.

    Args:
        layers: those that are linearized.
        work: the working folder, with what attention transfer has left.

    Returns:
        The course that it took, the tensors it has changed, and how many parameters were trained.
    """
    stage = plan.recipe.stages[0]
    settings, seed = stage.settings, plan.recipe.calibration.seed
    assert isinstance(settings, LinearizeSettings)
    low_rank = settings.trained == "lora"
    sharded = sharding_asked() and accelerator.num_processes > 1
    device = torch.device("cpu") if sharded else accelerator.device  # sharding moves block by block
    target = target_of(stage, plan.skeleton)
    with unseen():
        dense = load_dense(plan.skeleton, torch.float32, device, trust_remote_code=options.trust_remote_code)
        student = target.student(dense, layers, work, share=low_rank)
    updates = add_lora(student, target.updated(student, layers), settings.rank, seed) if low_rank else {}
    if settings.gradient_checkpointing:
        older = not hasattr(student, "activation_checkpointing_enable")  # transformers before 5.23
        enable = student.gradient_checkpointing_enable if older else student.activation_checkpointing_enable
        enable()
    for model in (dense, student) if sharded else ():
        shard(model, plan.skeleton.block_names, accelerator.device)
    with torch.enable_grad():
        course = course_of(settings, seed)
        found = distill(dense, student, ids, course, accelerator, work / CHECKPOINT, tick, target.kind)
    count = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return found, trained_tensors(student, updates), count


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
        assert inputs.calibration is not None
        layers = [layer for layer in range(len(plan.skeleton.blocks)) if layer not in facts["kept"]]
        train_student(plan, options, layers, inputs.calibration.ids, work, accelerator)
    accelerator.end_training()


def stopwatch(tokens_a_step: int, advance: Callable[[int], None], now: Callable[[str], None]) -> Any:
    """A ``tick`` that says how far training is and how fast it goes."""
    reached, clock = 0, time.perf_counter()

    def tick(step: int, steps: int, loss: float) -> None:
        nonlocal reached
        speed = step * tokens_a_step / (time.perf_counter() - clock)
        now(f"step {step} of {steps}: KL {loss:.3g}, {speed:.0f} tokens/s")
        advance(step * tokens_a_step - reached)
        reached = step * tokens_a_step

    return tick
