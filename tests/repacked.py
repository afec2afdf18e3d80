"""Folders whose linears are stored as a test wants them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.output import copy_companions
from compressor.engine.skeleton import build_skeleton
from compressor.formats import GroupInt, LowRank, Masked, Representation, Sum, pack, tensor_name
from compressor.formats.dense import Dense
from compressor.formats.group_int import portable_scale
from compressor.run.container import folder_config
from compressor.run.write import write_config

Code = Callable[[str, Tensor], Representation | None]


def repack(source: Path, folder: Path, code: Code) -> Path:
    """Write ``source`` again with what ``code`` makes of a linear's path and weight (out, in); None leaves it dense."""
    skeleton = build_skeleton(open_checkpoint(source))
    tensors = {name: skeleton.read(name) for name in skeleton.origins}
    specs: dict[str, Any] = {}
    for linear in skeleton.linears:
        weight = tensors[f"{linear.name}.weight"]
        made = code(linear.name, weight.T.contiguous() if linear.transposed else weight)
        if made is not None:
            del tensors[f"{linear.name}.weight"]
            specs[linear.name], parts = pack(made, linear.dtype)
            tensors |= {tensor_name(linear.name, part): tensor for part, tensor in parts.items()}
    folder.mkdir(parents=True)
    copy_companions(source, folder)
    write_config(folder, folder_config(skeleton, specs))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def truncated(weight: Tensor, rank: int) -> LowRank:
    """The nearest matrix of a rank, its factors in fp16."""
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return LowRank(Dense((u[:, :rank] * root).half()), Dense((root[:, None] * v[:rank]).half()))


def integers(weight: Tensor) -> GroupInt:
    """Symmetric 4-bit codes, a scale for every row."""
    scale = portable_scale(weight.float().abs().amax(1, keepdim=True) / 7, 4)
    return GroupInt((weight.float() / scale).round().clamp(-8, 7).to(torch.int8), scale, None, 4)


def everything(name: str, weight: Tensor) -> Representation | None:
    """In turn a low-rank matrix, sums with integers and dense, integers, a pruned matrix, and an untouched one."""
    term = truncated(weight, 4)
    pruned = Masked(weight, weight.abs() > weight.abs().float().median())
    kinds = [term, Sum(integers(weight), term), Sum(Dense(weight * 0.5), term), integers(weight), pruned, None]
    return kinds[sum(map(ord, name)) % 6]
