"""Where attention transfer leaves what it has made of each block, in the working folder of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from compressor.engine.tensorfile import layout_of, read_header, read_tensor, write_file


def mixer_file(work: Path, block: int) -> Path:
    """The file of a block."""
    return work / f"mixer-{block:05d}.safetensors"


def write_mixer(work: Path, block: int, tensors: Mapping[str, Tensor]) -> None:
    """Keep what is new in a block, by names relative to its student."""
    write_file(mixer_file(work, block), layout_of(tensors.items()), tensors.__getitem__)


def read_mixer(work: Path, block: int) -> dict[str, Tensor]:
    """Return what :func:`write_mixer` has kept."""
    return {name: read_tensor(entry) for name, entry in read_header(mixer_file(work, block)).items()}
