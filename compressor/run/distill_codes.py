"""When every block has been quantized: let all codes learn together, then write the blocks and send the streams on."""

from __future__ import annotations

import shutil
import time
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.engine.distill_codes import Distilled, distill
from compressor.engine.limits import available_memory
from compressor.engine.skeleton import Linear
from compressor.engine.tensorfile import layout_of, read_header, read_tensor, write_file
from compressor.engine.tune import Learner, steady
from compressor.errors import UserError
from compressor.formats import Representation, tensor_name, unpack
from compressor.formats.registry import format_of
from compressor.methods.quantize_settings import QuantizeSettings
from compressor.run import write
from compressor.run.plan import Plan
from compressor.run.session import Run
from compressor.run.transform import install, open_block, pack_block, remark
from compressor.run.tuning import learner_of

QUANTIZED, DENSE = "stage 0", "stage 0 before"
"""Streams of calibration windows: through what is compressed, and through the model as it was given."""


def check_room(plan: Plan) -> None:
    """Refuse to learn end to end what does not fit into memory.

    Raises:
        UserError: names the bytes needed and free.
    """
    needed, free = plan.learned_bytes[0], available_memory()
    if plan.device.type == "cuda":
        free = torch.cuda.mem_get_info(plan.device)[0]
    if needed > free:
        raise UserError(
            f"learning end to end keeps {needed / 1e9:.1f} GB in memory, {free / 1e9:.1f} GB are free",
            fix="--tune-mode block, which learns one block at a time",
        )


def put_down_codes(run: Run, block: int, parts: dict[str, dict[str, Tensor]]) -> None:
    """Keep the codes of a block, by linear name, for when all of them learn."""
    tensors = {tensor_name(name, part): tensor for name, own in parts.items() for part, tensor in own.items()}
    _folder(run).mkdir(exist_ok=True)
    write_file(_codes_file(run, block), layout_of(tensors.items()), tensors.__getitem__)


def learn_together(run: Run) -> None:
    """Learn, write every block, and send the streams of the compressed model through; nothing where it is not asked.

    May be repeated after a kill: what learning starts at stays on disk until everything is written.
    """
    if not run.end_to_end or "learned" in run.journal.facts:
        return
    since = time.perf_counter()
    with steady(run.runner):
        learners = _learners(run)
    learned = _learn(run, learners)
    run.timed("learning", since)
    for name in run.outputs:
        run.streams[name] = run.outer(name).start(run.streams[name].ids)
    for block in range(run.blocks):
        _write_block(run, block, learners, learned)
    run.journal.save_states(run.blocks, {name: stream.states for name, stream in run.streams.items()})
    run.journal.facts["learned"] = list(learned.curve)
    run.journal.write()
    shutil.rmtree(_folder(run))


def _learners(run: Run) -> dict[str, tuple[Linear, Learner]]:
    """The codes that the stage has made, ready to learn."""
    targets = {linear.name for linear in run.plan.targets[0]}
    learners: dict[str, tuple[Linear, Learner]] = {}
    for block in range(run.blocks):
        linears, codes = _of_block(run, block), _codes(run, block)
        work = open_block(run.skeleton, linears)
        for linear in linears:
            if linear.name in targets & codes.keys():
                weight = work.weights[linear.name].dense().to(run.runner.device, torch.float32)
                learners[linear.name] = linear, learner_of(_on(codes[linear.name], weight.device), weight)
    return learners


def _learn(run: Run, learners: dict[str, tuple[Linear, Learner]]) -> Distilled:
    settings = run.recipe.stages[0].settings
    assert isinstance(settings, QuantizeSettings)  # no other stage learns
    given, before = run.streams[DENSE], run.outer(DENSE)
    runner = run.outer(QUANTIZED)

    def dense(windows: Tensor) -> Tensor:
        return before.head(given.ids[windows], given.states[windows].to(before.device))

    with run.voice.progress(settings.tune_steps) as ticker:
        ticker.now("learning end to end")
        return distill(
            runner,
            runner.start(given.ids),
            dense,
            learners,
            steps=settings.tune_steps,
            rate=settings.tune_rate,
            folder=_folder(run),
            tick=ticker.advance,
        )


def _note(learned: Distilled) -> str:
    steps = learned.curve[-1][0]
    curve = " ".join(f"{loss:.4f}" for _, loss in learned.curve)
    return (
        f"learned end to end: divergence from the dense model on held-out windows {learned.before:.4f} -> "
        f"{learned.after:.4f} nats a token (best after {learned.step} of {steps} steps; on the way {curve})"
    )


def _write_block(run: Run, block: int, learners: dict[str, tuple[Linear, Learner]], learned: Distilled) -> None:
    """Write a block with what was learned, note it, and send what goes through the compressed model through it."""
    since = time.perf_counter()
    linears, codes, record = _of_block(run, block), _codes(run, block), run.journal.blocks[block]
    run.runner.load_block(block)
    work = open_block(run.skeleton, linears)
    work.layers = {row["name"]: row for row in record["layers"]}
    for linear in linears:
        if linear.name in learners:
            remark(work, linear, [_note(learned)])
        if linear.name in learners and learned.step:
            install(work, linear, learners[linear.name][1].finish(), run.runner)
            work.layers[linear.name]["relative_error"] = None  # measured before
        elif linear.name in codes:
            install(work, linear, codes[linear.name], run.runner)
    specs, parts = pack_block(work, linears)
    write.write_block(run.folder, run.plan, block, specs, parts, work)
    record |= {"specs": specs, "layers": list(work.layers.values())}
    run.timed("packing and writing", since)
    since = time.perf_counter()
    for name in run.outputs:
        run.runner.step(block, run.streams[name])
    run.runner.release_block(block)
    run.timed("evaluating", since)


def _of_block(run: Run, block: int) -> list[Linear]:
    return [linear for linear in run.skeleton.linears if linear.block == block]


def _codes(run: Run, block: int) -> dict[str, Representation]:
    """What `put_down_codes` kept, by linear name."""
    entries = read_header(_codes_file(run, block))
    found = {}
    for name, spec in run.journal.blocks[block]["specs"].items():
        parts = {part: read_tensor(entries[tensor_name(name, part)]) for part in format_of(spec).layout(spec)}
        found[name] = unpack(spec, parts)
    return found


def _on(code: Any, device: torch.device) -> Any:
    """A code with its tensors on ``device``, as the solver would have made it there."""
    values = {field.name: getattr(code, field.name) for field in fields(code)}
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = value.to(device)
        elif is_dataclass(value):
            values[name] = _on(value, device)
    return replace(code, **values)


def _folder(run: Run) -> Path:
    return run.journal.folder / "learning"


def _codes_file(run: Run, block: int) -> Path:
    return _folder(run) / f"codes-{block:05d}.safetensors"
