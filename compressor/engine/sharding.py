"""Models of which every process holds a part: FSDP2 of torch, asked for by ``accelerate launch --use_fsdp``.

We shard by ourselves, block by block, and let accelerate only start the processes: its own way needs a GPU before it
shards anything, and would load the models as empty ones. What reaches files is whole tensors: a run may go on with
another number of processes, sharded or not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from compressor.errors import UserError

ASKED = "ACCELERATE_USE_FSDP"
"""Environment variable by which accelerate's launcher asks for it."""


def sharding_asked() -> bool:
    """Whether the models are to be sharded.

    Raises:
        UserError: with parameters on the CPU, which we cannot.
    """
    asked = os.environ.get(ASKED, "false").lower() in ("true", "1")
    if asked and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise UserError("sharded models cannot be offloaded to the CPU here", fix="--fsdp_offload_params false")
    return asked


@contextmanager
def unseen() -> Iterator[None]:
    """Hide from accelerate and transformers that sharding is asked for: they would do it in their way."""
    told = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if told is not None:
            os.environ[ASKED] = told


def shard(model: nn.Module, blocks: Sequence[str], device: torch.device) -> None:
    """Shard a whole model in place, over all processes; parameters become new objects, on ``device``.

    Args:
        model: on the CPU, or on ``device``.
        blocks: paths of what is gathered at once; all the rest is gathered together.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for path in blocks:
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # else a teacher's embeddings and head would stay whole


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` has been here."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is without sharding. Every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that a process holds, distributed as ``like`` is; the other way round of
    :func:`whole`.
    """
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The optimizer's ``state_dict`` of whole tensors. Every process must ask for it."""
    content = optimizer.state_dict()
    state = {
        number: {key: whole(value) if isinstance(value, Tensor) else value for key, value in entries.items()}
        for number, entries in sorted(content["state"].items())
    }
    return {**content, "state": state}


def load_optimizer(optimizer: Any, content: dict[str, Any]) -> None:
    """Take up what :func:`optimizer_state` has given."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {key: part_of(v, parameters[number]) if isinstance(v, Tensor) else v for key, v in entries.items()}
        for number, entries in content["state"].items()
    }
    optimizer.load_state_dict({**content, "state": state})
