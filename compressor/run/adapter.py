"""Take the low-rank terms out of a folder: a model folder without them, and a PEFT adapter that belongs to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.engine.checkpoint import open_checkpoint, resolve_model
from compressor.engine.journal import write_atomically
from compressor.engine.output import (
    building,
    check_disk,
    check_output,
    check_working,
    copy_companions,
    finish_shards,
    working_folder,
    write_shard,
)
from compressor.engine.skeleton import Skeleton, build_skeleton
from compressor.engine.tensorfile import TensorEntry
from compressor.errors import UserError
from compressor.formats import Dense, LowRank, Spec, Sum, format_of, tensor_name
from compressor.formats.low_rank import FACTOR_DTYPE
from compressor.formats.parts import parse_dtype
from compressor.methods.decompose_settings import DecomposeSettings
from compressor.run.container import container_of, folder_config
from compressor.run.plan import Plan
from compressor.run.write import write_config

ADAPTER = "adapter"
"""Subfolder of the output that holds the adapter."""

SPLIT = ("sum", "low-rank")
"""Formats with a low-rank term; what is left of a matrix that is nothing else is zero."""


@dataclass(frozen=True)
class Split:
    """What was taken apart: how many low-rank terms, and the bytes of their factors."""

    corrections: int
    adapter_bytes: int


def check_split(plan: Plan, output: Path, folder: Path) -> None:
    """Refuse, before a run begins, to split its result into ``folder`` where that cannot be done.

    Args:
        plan: of the run.
        output: where its result will be.

    Raises:
        UserError: ``folder`` cannot be written or is in the way of ``output``, the run breaks a rule, or its result
            will have no low-rank terms or those of experts.
    """
    plan.refuse()
    if plan.recipe.save == "dense":
        raise UserError("a dense output has no low-rank terms to split off", fix="leave --save dense out")
    split = [name for name, spec in plan.specs.items() if spec["format"] in SPLIT]
    for stage, linears in zip(plan.recipe.stages, plan.targets, strict=True):
        if isinstance(stage.settings, DecomposeSettings) and stage.settings.surveyed:  # which of them is not known yet
            split += [linear.name for linear in linears]
    if not split:
        raise UserError("the result would have no low-rank terms to split off", fix="leave --emit-adapter out")
    if any(".experts." in name for name in split):
        raise UserError(
            "experts would be decomposed, which PEFT cannot adapt one by one", fix=r"--exclude '\.experts\.'"
        )
    ours = {output.resolve(), working_folder(output).resolve()}
    for path in (folder.resolve(), working_folder(folder).resolve()):
        if any(path == other or path in other.parents or other in path.parents for other in ours):
            raise UserError(f"{folder} is in the way of the output {output}", fix="choose another --emit-adapter")
    source = plan.skeleton.checkpoint
    check_output(folder, source.folder, overwrite=False, flag="--emit-adapter")
    check_working(working_folder(folder))
    check_disk(folder, plan.disk_bytes + source.nbytes)


def split_adapter(model: str, output: Path, *, trust_remote_code: bool = False) -> Split:
    """Write a model as a folder without its low-rank terms, and these as a PEFT adapter in a subfolder.

    Together they compute what the source does, up to rounding; the folder alone is what the codes say, and zero where
    there are none. Where every base is dense it is a plain checkpoint, and where all codes are symmetric integers a
    compressed-tensors folder; either needs nothing of ours.

    Args:
        model: folder or hub id of a model with matrices of a format in `SPLIT`.
        output: must not exist.
        trust_remote_code: run code that the folder brings along.

    Raises:
        UserError: no low-rank terms, those of experts (which PEFT cannot adapt one by one), or a bad output.
    """
    checkpoint = open_checkpoint(resolve_model(model))
    skeleton = build_skeleton(checkpoint, trust_remote_code=trust_remote_code)
    split = {name: spec for name, spec in skeleton.packed.items() if spec["format"] in SPLIT}
    if not split:
        raise UserError(
            f"{model} holds no low-rank corrections or matrices",
            fix="make one with compressor quantize --correct 16, or with compressor decompose",
        )
    if (expert := next((name for name in split if ".experts." in name), None)) is not None:
        raise UserError(f"{expert} is one of many experts, which PEFT cannot adapt one by one")
    check_output(output, checkpoint.folder, overwrite=False)
    with building(output) as folder:
        (folder / ADAPTER).mkdir()
        _write_base(skeleton, split, folder)
        size = _write_adapter(skeleton, split, folder / ADAPTER)
    return Split(len(split), size)


@dataclass(frozen=True)
class Written:
    """One tensor of the base: its name, what it is, and how to come by it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def _write_base(skeleton: Skeleton, split: Mapping[str, Spec], folder: Path) -> None:
    checkpoint = skeleton.checkpoint
    bases = {name: spec["base"] for name, spec in split.items() if spec["format"] == "sum"}
    specs = {name: bases.get(name, spec) for name, spec in skeleton.packed.items()}
    # a dense base is an ordinary tensor of its module, as the zeros are
    specs = {name: spec for name, spec in specs.items() if name not in split or spec["format"] not in ("dense", *SPLIT)}
    plain = container_of(skeleton, specs) == "plain"
    for number, file in enumerate(checkpoint.files, 1):
        written: dict[str, Written] = {}
        for entry in checkpoint.tensors.values():
            if entry.file == file and (tensor := _of_base(skeleton, split, entry)) is not None:
                name = skeleton.source_name(tensor.name) if plain and tensor.name in skeleton.origins else tensor.name
                written[name] = tensor
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()}
        reads = {name: tensor.read for name, tensor in written.items()}
        write_shard(folder, number, len(checkpoint.files), layout, partial(_call, reads))
    finish_shards(folder, len(checkpoint.files))
    copy_companions(checkpoint.folder, folder)
    write_config(folder, folder_config(skeleton, specs))


def _call(reads: Mapping[str, Callable[[], Tensor]], name: str) -> Tensor:
    return reads[name]()


def _of_base(skeleton: Skeleton, split: Mapping[str, Spec], entry: TensorEntry) -> Written | None:
    """What becomes of a stored tensor: the same, a part of a base, or nothing, as of a factor."""
    module, _, part = entry.name.rpartition(".weight_")
    if module not in split:
        return Written(entry.name, entry.dtype, entry.shape, lambda: skeleton.checkpoint.read(entry.name))
    spec, turned = split[module], skeleton.is_transposed(f"{module}.weight")
    m, n = spec["shape"]
    shape = (n, m) if turned else (m, n)
    if spec["format"] == "low-rank":
        if part != next(iter(format_of(spec).layout(spec))):
            return None
        dtype = parse_dtype(spec["dtype"])
        return Written(f"{module}.weight", dtype, shape, lambda: torch.zeros(shape, dtype=dtype))
    if part.startswith("correction_"):
        return None
    name = tensor_name(module, part.removeprefix("base_"))
    if spec["base"]["format"] == "dense" and turned:
        return Written(name, entry.dtype, shape, lambda: skeleton.checkpoint.read(entry.name).T.contiguous())
    return Written(name, entry.dtype, entry.shape, lambda: skeleton.checkpoint.read(entry.name))


def _write_adapter(skeleton: Skeleton, split: Mapping[str, Spec], folder: Path) -> int:
    """Write the factors as LoRA's A (r, n) and B (m, r), with a scaling of 1; return their bytes."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    turned = False
    for name in split:
        code = skeleton.representation(name)
        term = code.correction if isinstance(code, Sum) else code
        assert isinstance(term, LowRank)
        for side, factor in (("A", term.right), ("B", term.left)):
            dtype = FACTOR_DTYPE if isinstance(factor, Dense) else torch.float32  # in which it is exact
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = factor.dense(dtype).contiguous()
        ranks[name] = term.rank
        coded = isinstance(code, Sum) and not isinstance(code.base, Dense)
        turned |= skeleton.is_transposed(f"{name}.weight") and not coded
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
        "fan_in_fan_out": turned,  # a Conv1D stays one where its base is dense
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
