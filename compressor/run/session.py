"""What a run was asked to do, and what it holds while it streams."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.journal import Journal
from compressor.engine.skeleton import Skeleton
from compressor.formats import GroupInt
from compressor.run.inputs import Inputs
from compressor.run.plan import Plan
from compressor.run.progress import Voice
from compressor.run.recipe import Recipe, Stage


@dataclass(frozen=True)
class Options:
    """What decides how a run behaves, but not the bytes of its output.

    Attributes:
        output: folder to write; appears when it is complete.
        fresh: forget an interrupted run instead of going on with it.
        overwrite: replace an output that compressor has written.
        trust_remote_code: run code that the model's folder brings along.
        revision: branch, tag or commit of a hub id.
        command: what the report says was typed.
        own_process: nothing else lives in this process: the garbage collector need not look at what is loaded by the
            time the run begins.
    """

    output: Path
    fresh: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    command: str = ""
    own_process: bool = False


@dataclass
class Run:
    """Everything a run holds while it streams.

    Attributes:
        runner: runs the blocks, and what is outside of them as the source has it.
        coded: runs what is outside of the blocks as the output has it.
        stages: those of the recipe, with everything settled that a survey of the model decides.
        ranks: of each stage, linear name -> components that are kept; None: the matrix stays whole.
        codes: module path -> code of the embeddings, where these are compressed.
    """

    recipe: Recipe
    options: Options
    source: str
    skeleton: Skeleton
    plan: Plan
    inputs: Inputs
    runner: BlockRunner
    coded: BlockRunner
    journal: Journal
    voice: Voice
    stages: list[Stage] = field(default_factory=list)
    ranks: list[dict[str, int | None]] = field(default_factory=list)
    codes: dict[str, GroupInt] = field(default_factory=dict)
    streams: dict[str, Stream] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    resumed_blocks: int = 0

    @property
    def folder(self) -> Path:
        """Where the future output is being written."""
        return self.journal.folder / "model"

    def outer(self, stream: str) -> BlockRunner:
        """Who embeds a stream, and makes logits of it: what stands for the source, or for the output."""
        before = stream == "dense" or stream.endswith(" before")
        if stream.startswith("stage ") and not before:
            settings = self.recipe.stages[int(stream.split()[1])].settings
            before = not getattr(settings, "embeddings", None)
        return self.runner if before else self.coded

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.skeleton.block_names)

    @property
    def end_to_end(self) -> bool:
        """Whether the codes of all blocks learn together, before any of them is written."""
        return any(stage.end_to_end for stage in self.recipe.stages)

    @property
    def outputs(self) -> list[str]:
        """The streams that go through the compressed model."""
        return [name for name in ("compressed", "probe") if name in self.streams]

    def timed(self, what: str, since: float) -> None:
        """Add the time since ``since`` (``time.perf_counter()``) to an entry of the report."""
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - since
