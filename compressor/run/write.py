"""What goes into the output folder besides reports: shards, configuration, tokenizer, reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from compressor.engine.journal import write_atomically
from compressor.engine.output import copy_companions, write_shard
from compressor.engine.tensorfile import layout_of
from compressor.formats import GroupInt, tensor_name
from compressor.hf.manifest import MODEL_TYPE, READER_NAME
from compressor.hf.reader import reader_source
from compressor.run.container import folder_config
from compressor.run.plan import Plan
from compressor.run.transform import BlockWork


def write_outer(folder: Path, plan: Plan, codes: Mapping[str, GroupInt]) -> None:
    """Write the first shard: everything outside the blocks, and tensors the model does not know.

    Args:
        codes: module path -> new code of an embedding.
    """
    skeleton = plan.skeleton
    rename = skeleton.source_name if plan.recipe.save == "dense" and plan.narrowing is None else str
    module_names = {rename(name): name for name in skeleton.outer_tensors()}
    packed: dict[str, Tensor] = {}
    for module in plan.outer_specs:
        dtype = skeleton.stored(f"{module}.weight")[0]
        parts = codes[module].parts(dtype) if module in codes else skeleton.read_parts(module)
        packed |= {tensor_name(module, part): tensor for part, tensor in parts.items()}

    def read(name: str) -> Tensor:
        if name in packed:
            return packed[name]
        if name not in module_names:
            return skeleton.checkpoint.read(name)
        module = module_names[name].removesuffix(".weight")
        if module in codes:
            return codes[module].dense(skeleton.stored(f"{module}.weight")[0])
        return skeleton.read(module_names[name])

    write_shard(folder, 1, len(plan.layouts), plan.layouts[0], read)


def write_block(
    folder: Path,
    plan: Plan,
    block: int,
    specs: dict[str, dict[str, Any]],
    parts: dict[str, dict[str, Tensor]],
    work: BlockWork,
) -> None:
    """Write the shard of a finished block, packed or dense."""
    if plan.recipe.save == "dense" and plan.narrowing is None:
        tensors = _dense_tensors(plan, block, work)
    else:
        tensors = {tensor_name(module, part): tensor for module in specs for part, tensor in parts[module].items()}
        for name in plan.skeleton.block_tensors(block):
            if name.removesuffix(".weight") not in specs:
                changed = work.narrow if name in work.narrow else work.folded
                tensors[name] = changed[name] if name in changed else plan.skeleton.read(name)
    write_shard(folder, block + 2, len(plan.layouts), layout_of(tensors.items()), tensors.__getitem__)


def _dense_tensors(plan: Plan, block: int, work: BlockWork) -> dict[str, Tensor]:
    """Block tensors under the source's names; experts go back into the fused tensors they came from."""
    skeleton = plan.skeleton
    transposed = {linear.name for linear in skeleton.linears if linear.transposed}
    tensors: dict[str, Tensor] = {}
    for name in skeleton.block_tensors(block):
        module = name.removesuffix(".weight")
        if module in work.weights:
            dtype = skeleton.stored(name)[0]
            value = work.weights[module].dense().to(dtype)
            value = value.T.contiguous() if module in transposed else value
        else:
            value = work.folded[name] if name in work.folded else skeleton.read(name)
        target, index = skeleton.source_name(name), skeleton.origins[name].index
        if index:
            dtype, shape = skeleton.source_layout(name)
            tensors.setdefault(target, torch.empty(shape, dtype=dtype))[index] = value
        else:
            tensors[target] = value
    return tensors


def write_companions(folder: Path, plan: Plan, specs: dict[str, dict[str, Any]]) -> None:
    """Write config.json, the recipe and, for packed folders, the reader; copy tokenizer and the rest unchanged."""
    copy_companions(plan.skeleton.checkpoint.folder, folder)
    narrow = None if plan.narrowing is None else plan.narrowing.config
    write_config(folder, narrow or folder_config(plan.skeleton, specs if plan.recipe.save == "packed" else {}))
    recipe = yaml.safe_dump(plan.recipe.resolved(), sort_keys=False, allow_unicode=True)
    write_atomically(folder / "recipe.yaml", recipe)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json, and the reader where it is needed; remove one that was copied from the source where not."""
    if config["model_type"] == MODEL_TYPE:
        write_atomically(folder / READER_NAME, reader_source())
    else:
        (folder / READER_NAME).unlink(missing_ok=True)
    write_atomically(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
