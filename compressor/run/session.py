"""What a run was asked to do, and what it holds while it streams."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.journal import Journal
from compressor.engine.skeleton import Skeleton
from compressor.run.inputs import Inputs
from compressor.run.plan import Plan
from compressor.run.progress import Voice
from compressor.run.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """What decides how a run behaves, but not the bytes of its output."""

    output: Path
    fresh: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    command: str = ""


@dataclass
class Run:
    """Everything a run holds while it streams."""

    recipe: Recipe
    options: Options
    source: str
    skeleton: Skeleton
    plan: Plan
    inputs: Inputs
    runner: BlockRunner
    journal: Journal
    voice: Voice
    streams: dict[str, Stream] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    resumed_blocks: int = 0

    @property
    def folder(self) -> Path:
        """Where the future output is being written."""
        return self.journal.folder / "model"

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.skeleton.block_names)

    def timed(self, what: str, since: float) -> None:
        """Add the time since ``since`` (``time.perf_counter()``) to an entry of the report."""
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - since
