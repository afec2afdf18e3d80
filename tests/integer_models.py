"""Folders whose matrices are integers, or almost, in every way that exports know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import repacked
import tiny_models
import torch
from torch import Tensor

from compressor.formats import GroupInt, SparseInt, TritPlanes
from compressor.methods import round_nearest
from compressor.methods.quantize_settings import RtnSettings

IDS = tiny_models.random_ids(2)


def source(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A tiny model of widths that every format for integers can divide: 64 and 128."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return tiny_models.save(tiny_models.random_model(family, dtype=dtype, **sizes, **more), folder)


def rounded(weight: Tensor, **settings: Any) -> GroupInt:
    """The weights on a grid of their own for every group."""
    code = round_nearest.solve(weight.float(), None, RtnSettings(**settings)).code
    assert isinstance(code, GroupInt)
    return code


def trits(weight: Tensor, group: int, planes: int = 1) -> TritPlanes:
    """Planes of trits; scales fp16 numbers that bf16 does not have."""
    left, found, scales = weight.float(), [], []
    for _ in range(planes):
        scale = left.abs().unflatten(1, (-1, group)).mean(2).half()
        steps = (left / scale.float().repeat_interleave(group, 1)).round().clamp(-1, 1)
        found.append(steps.to(torch.int8))
        scales.append(scale)
        left = left - steps * scale.float().repeat_interleave(group, 1)
    return TritPlanes(torch.stack(found), torch.stack(scales), group)


def sparse(weight: Tensor, bits: int = 4) -> SparseInt:
    """Half of the weights pruned, the others on an affine grid a row."""
    low, high = weight.float().amin(1, keepdim=True), weight.float().amax(1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale.float()).round().clamp(0, 2**bits - 1)
    codes = (weight.float() / scale.float() + zero).round().clamp(0, 2**bits - 1)
    mask = weight.abs() > weight.abs().float().median()
    return SparseInt(codes.to(torch.uint8), scale[:, 0], zero[:, 0].to(torch.uint8), mask, bits)


def mixed(name: str, weight: Tensor) -> Any:
    """Integers of every kind: with and without zero points, of several widths, trits, pruned ones; and dense."""
    if "down_proj" in name:
        return trits(weight, 64)
    if "up_proj" in name:
        return rounded(weight, bits=4, group=32, asymmetric=True)
    if "k_proj" in name:
        return sparse(weight) if weight.dtype == torch.float32 else rounded(weight, bits=7, group=32)
    if "v_proj" in name:
        return None
    if "o_proj" in name:
        return rounded(weight, bits=3, group="row")
    return repacked.Masked(weight, weight > 0) if "gate_proj" in name else rounded(weight, bits=5, group=64)
