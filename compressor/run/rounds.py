"""Attention transfer, shared out: in a round every process teaches one of the next blocks.

A block learns from the dense model's states alone, and to send the training windows through it costs next to nothing
beside teaching it. So every process sends them through all blocks of a round and teaches its own one: no tensor travels
between processes, and what a block learns does not depend on who taught it, or on how many there are.

What a process has made of a block lies in the working folder at once: a round that was interrupted teaches only what it
had not finished. The journal is the first process's alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.journal import read_journal
from compressor.engine.processes import together
from compressor.engine.students import Students
from compressor.engine.transfer import Lesson, transfer_block
from compressor.methods.linearize_settings import LinearizeSettings
from compressor.run.inputs import Inputs
from compressor.run.linear_target import target_of
from compressor.run.mixer_files import has_record, write_mixer, write_record
from compressor.run.plan import Plan
from compressor.run.progress import Ticker

Round = list[tuple[int, int | None]]
"""Blocks in order, each with the process that teaches it; None: it stays as it is."""

STREAM = "stage 0"
"""Name of the training windows among the streams."""


@dataclass(frozen=True)
class School:
    """Everything that is needed to teach any block.

    Attributes:
        kept: blocks that are known to stay softmax.
        work: the working folder.
    """

    runner: BlockRunner
    students: Students
    lesson: Lesson
    kept: frozenset[int]
    work: Path


def school_of(plan: Plan, runner: BlockRunner, work: Path) -> School:
    """How the settings want blocks to be taught."""
    stage = plan.recipe.stages[0]
    settings = stage.settings
    assert isinstance(settings, LinearizeSettings)
    rate = settings.transfer_rate(plan.skeleton.config.get_text_config().hidden_size)
    lesson = Lesson(
        settings.stages[0], settings.batch, rate, settings.gate_rate, settings.memory_alone,
        plan.recipe.calibration.seed,
    )  # fmt: skip
    return School(runner, target_of(stage, plan.skeleton).students, lesson, frozenset(settings.keep_layers), work)


def rounds(blocks: Iterable[int], kept: Container[int], processes: int) -> Iterator[Round]:
    """Part the blocks into rounds of at most one block to teach for each process, first processes first."""
    part: Round = []
    taken = 0
    for block in blocks:
        taught = block not in kept
        if taught and taken == processes:
            yield part
            part, taken = [], 0
        part.append((block, taken if taught else None))
        taken += taught
    if part:
        yield part


def teach(
    part: Round,
    rank: int,
    school: School,
    streams: Iterable[Stream],
    windows: Stream,
    tick: Callable[[int, int, float], None] = lambda block, tokens, error: None,
    visit: Callable[[int], None] = lambda block: None,
) -> None:
    """Do one process's share of a round: teach its block, unless an earlier run has, and send streams through all.

    Args:
        streams: all that pass the blocks, ``windows`` among them.
        windows: what is trained on.
        tick: told after every step the block, how many tokens it has been, and the step's error.
        visit: called with each block while it is loaded.
    """
    for block, owner in part:
        school.runner.load_block(block)
        visit(block)
        if owner == rank and not has_record(school.work, block):
            _teach_block(block, school, windows, tick)
        for stream in streams:
            school.runner.step(block, stream)
        school.runner.release_block(block)


def _teach_block(block: int, school: School, windows: Stream, tick: Callable[[int, int, float], None]) -> None:
    def told(tokens: int, error: float) -> None:
        tick(block, tokens, error)

    got = transfer_block(school.runner, block, windows, school.students, school.lesson, told)
    write_mixer(school.work, block, got.tensors)
    record = {
        "before": got.before, "after": got.after, "memory": got.memory, "window": got.window, "curve": got.curve,
    }  # fmt: skip
    write_record(school.work, block, record)


def tick_of(part: Round, ticker: Ticker) -> Callable[[int, int, float], None]:
    """A ``tick`` that shows how far a round is: the other processes are where this one is, as far as it can know."""
    clock, reached, taught = time.perf_counter(), 0, sum(owner is not None for _, owner in part)

    def tick(block: int, tokens: int, error: float) -> None:
        nonlocal reached
        others = f" and {taught - 1} more" if taught > 1 else ""
        speed = taught * tokens / (time.perf_counter() - clock)
        ticker.now(f"block {block + 1}{others}: relative error {error:.3g}, {speed:.0f} tokens/s")
        ticker.advance(taught * (tokens - reached))
        reached = tokens

    return tick


def help_teaching(plan: Plan, inputs: Inputs, work: Path, accelerator: Any) -> None:
    """What every process but the first does. The journal of ``work`` is open, and the first process teaches too."""
    journal = read_journal(work)
    left = range(len(journal.blocks), len(plan.skeleton.blocks))
    if not left:
        return
    runner = BlockRunner(plan.skeleton, device=plan.device, dtype=plan.dtype)
    school = school_of(plan, runner, work)
    begun: list[Stream] = []
    for part in rounds(left, school.kept, accelerator.num_processes):
        with together(accelerator):  # what goes wrong before the first round is told in it too
            begun = begun or [_begin(runner, inputs, journal.load_states() if journal.blocks else {})]
            teach(part, accelerator.process_index, school, begun, begun[0])


def _begin(runner: BlockRunner, inputs: Inputs, states: dict[str, Any]) -> Stream:
    assert inputs.calibration is not None
    runner.load_outer()
    stream = runner.start(inputs.calibration.ids)
    stream.states = states.get(STREAM, stream.states)
    return stream
