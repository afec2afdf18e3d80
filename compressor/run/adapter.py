"""Take the low-rank corrections out of a folder: a smaller model folder, and a PEFT adapter that belongs to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.engine.checkpoint import open_checkpoint, resolve_model
from compressor.engine.journal import exclusive, write_atomically
from compressor.engine.output import (
    check_output,
    check_working,
    clear_working,
    copy_companions,
    finish_shards,
    publish,
    working_folder,
    write_shard,
)
from compressor.engine.skeleton import Skeleton, build_skeleton
from compressor.engine.tensorfile import Layout
from compressor.errors import UserError
from compressor.formats import Dense, Sum, tensor_name
from compressor.formats.low_rank import FACTOR_DTYPE
from compressor.run.container import folder_config
from compressor.run.write import write_config

ADAPTER = "adapter"
"""Subfolder of the output that holds the adapter."""


@dataclass(frozen=True)
class Split:
    """What was taken apart: how many corrections, and the bytes of their factors."""

    corrections: int
    adapter_bytes: int


def split_adapter(model: str, output: Path) -> Split:
    """Write a corrected model as a folder without its corrections, and these as a PEFT adapter in a subfolder.

    Together they compute what the source does, up to rounding; the folder alone is what the codes say. Where all codes
    are symmetric integers it is a compressed-tensors folder, which needs nothing of ours.

    Args:
        model: folder or hub id of a model made with ``--correct``.
        output: must not exist.

    Raises:
        UserError: no corrections, corrections of experts (which PEFT cannot adapt one by one), or a bad output.
    """
    checkpoint = open_checkpoint(resolve_model(model))
    skeleton = build_skeleton(checkpoint)
    sums = {name: spec for name, spec in skeleton.packed.items() if spec["format"] == "sum"}
    if not sums:
        raise UserError(f"{model} holds no low-rank corrections", fix="make one with compressor quantize --correct 16")
    if (expert := next((name for name in sums if ".experts." in name), None)) is not None:
        raise UserError(f"{expert} is one of many experts, which PEFT cannot adapt one by one")
    check_output(output, checkpoint.folder, overwrite=False)
    work = working_folder(output)
    check_working(work)
    work.mkdir(parents=True, exist_ok=True)
    with exclusive(work):
        clear_working(work)
        folder = work / "model"
        (folder / ADAPTER).mkdir(parents=True)
        specs = {name: spec["base"] if name in sums else spec for name, spec in skeleton.packed.items()}
        _write_base(skeleton, sums, specs, folder)
        size = _write_adapter(skeleton, sums, folder / ADAPTER)
        publish(folder, output)
    shutil.rmtree(work, ignore_errors=True)
    return Split(len(sums), size)


def _write_base(
    skeleton: Skeleton, sums: Mapping[str, Any], specs: Mapping[str, Mapping[str, Any]], folder: Path
) -> None:
    checkpoint = skeleton.checkpoint
    renamed = {_base_name(name, sums): name for name in checkpoint.tensors if not _is_factor(name, sums)}
    shards: dict[Path, Layout] = {file: {} for file in checkpoint.files}
    for name, source in renamed.items():
        entry = checkpoint.tensors[source]
        shards[entry.file][name] = (entry.dtype, entry.shape)
    for number, layout in enumerate(shards.values(), 1):
        write_shard(folder, number, len(shards), layout, lambda name: checkpoint.read(renamed[name]))
    finish_shards(folder, len(shards))
    copy_companions(checkpoint.folder, folder)
    write_config(folder, folder_config(skeleton, specs))


def _module(name: str) -> tuple[str, str]:
    """Module path and part of a packed tensor's name."""
    module, _, part = name.rpartition(".weight_")
    return module, part


def _is_factor(name: str, sums: Mapping[str, Any]) -> bool:
    module, part = _module(name)
    return module in sums and part.startswith("correction_")


def _base_name(name: str, sums: Mapping[str, Any]) -> str:
    module, part = _module(name)
    return tensor_name(module, part.removeprefix("base_")) if module in sums else name


def _write_adapter(skeleton: Skeleton, sums: Mapping[str, Any], folder: Path) -> int:
    """Write the factors as LoRA's A (r, n) and B (m, r), with a scaling of 1; return their bytes."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in sums:
        code = skeleton.representation(name)
        assert isinstance(code, Sum)
        for side, factor in (("A", code.correction.right), ("B", code.correction.left)):
            dtype = FACTOR_DTYPE if isinstance(factor, Dense) else torch.float32  # in which it is exact
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = factor.dense(dtype).contiguous()
        ranks[name] = code.correction.rank
    rank = max(ranks.values())
    other = {name: value for name, value in ranks.items() if value != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
