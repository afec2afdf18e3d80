"""Where attention transfer leaves what it has made of each block, in the working folder of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.engine.journal import write_atomically
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


def write_record(work: Path, block: int, record: Mapping[str, Any]) -> None:
    """Keep how a block has learnt. Written after its mixer: where there is a record, the block is done."""
    write_atomically(_record_file(work, block), json.dumps(record))


def has_record(work: Path, block: int) -> bool:
    """Whether a block has been taught."""
    return _record_file(work, block).exists()


def read_record(work: Path, block: int) -> dict[str, Any]:
    """Return what :func:`write_record` has kept."""
    record: dict[str, Any] = json.loads(_record_file(work, block).read_text())
    return record


def _record_file(work: Path, block: int) -> Path:
    return work / f"mixer-{block:05d}.json"
