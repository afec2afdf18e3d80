"""What a run makes of a model: layers of our own in a folder that needs us, or a model that stock transformers has.

Everything in which the two differ is behind :class:`Target`; the run itself (``run/linearize.py``) knows only this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.engine.distill import Kind
from compressor.engine.skeleton import Skeleton
from compressor.engine.students import Students
from compressor.engine.tensorfile import Layout
from compressor.methods.linearize_native import NativeSettings
from compressor.methods.linearize_settings import LinearizeSettings
from compressor.run.container import Container
from compressor.run.linear_native import NativeTarget
from compressor.run.linear_own import OwnTarget
from compressor.run.recipe import Stage


class Target(Protocol):
    """One kind of result. ``work`` is always the working folder of the run, with what attention transfer has left.

    Attributes:
        students: what blocks are trained with.
        container: kind of folder that is written.
        trains_written: whether end-to-end training starts from the written folder ``work / "model"``.
    """

    @property
    def students(self) -> Students: ...
    @property
    def container(self) -> Container: ...
    @property
    def trains_written(self) -> bool: ...

    def content(self) -> dict[str, Any]:
        """What a linearized layer computes, for the report."""
        ...

    def violations(self, kept: int, seqlen: int) -> list[str]:
        """What stands against making it of this model, with what would mend it.

        Args:
            kept: how many layers stay softmax; ``seqlen``: tokens in a window that is trained on.
        """
        ...

    def layouts(self, layers: Sequence[int]) -> list[Layout]:
        """Contents of every shard, what is outside the blocks first, from headers alone."""
        ...

    def shard(self, number: int, layers: Sequence[int], work: Path) -> tuple[Layout, Callable[[str], Tensor]]:
        """Contents of a shard as attention transfer left it, and how to get them; 0 is what is outside the blocks."""
        ...

    def config(self, layers: Sequence[int]) -> dict[str, Any]:
        """The content of config.json."""
        ...

    def student(self, dense: Any, layers: Sequence[int], work: Path, device: torch.device, *, share: bool) -> Any:
        """The whole model, in fp32, on a device.

        Args:
            dense: the source on that device; may be None where training starts from the written folder.
            share: whether weights may be those of ``dense`` themselves; they must not be trained then.
        """
        ...

    def updated(self, student: Any, layers: Sequence[int]) -> list[str]:
        """Paths of the linears that get low-rank updates."""
        ...

    def kind(self, name: str) -> Kind:
        """What a parameter of that model is."""
        ...


def target_of(stage: Stage, skeleton: Skeleton) -> Target:
    """What a linearizing stage makes of a model."""
    settings = stage.settings
    assert isinstance(settings, LinearizeSettings)
    if isinstance(settings, NativeSettings):
        return NativeTarget(stage.name, skeleton)
    return OwnTarget(stage.name, settings, skeleton)
