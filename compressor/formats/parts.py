"""What every format has in common: names of dtypes, and the check of packed tensors against their layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Spec = Mapping[str, Any]
"""The JSON object that describes one packed matrix: ``{"format": ..., "shape": [m, n], "dtype": ..., ...}``."""

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Part name -> (shape, dtype): the packed tensors on paper."""

WEIGHT_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype of that name; ValueError when it is not one a packed matrix can have."""
    if name not in WEIGHT_DTYPES:
        raise ValueError(f"dtype {name!r} of a packed matrix is not one of {', '.join(WEIGHT_DTYPES)}")
    return WEIGHT_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of ``dtype`` as it stands in a spec; ValueError when a format cannot hold it."""
    name = str(dtype).removeprefix("torch.")
    if name not in WEIGHT_DTYPES:
        raise ValueError(f"cannot pack a weight of dtype {name}: expected one of {', '.join(WEIGHT_DTYPES)}")
    return name


def matrix_shape(spec: Spec) -> tuple[int, int]:
    """Return (m, n) = (outputs, inputs); ValueError when the spec's shape is not a matrix."""
    shape = tuple(spec["shape"])
    if len(shape) != 2 or not all(isinstance(side, int) and side >= 0 for side in shape):
        raise ValueError(f"shape {list(shape)} of a packed matrix is not two non-negative integers")
    return shape[0], shape[1]


def check_parts(parts: Mapping[str, Tensor], layout: Layout, name: str) -> None:
    """Refuse packed tensors that are not exactly those of the layout.

    Args:
        parts: part name -> packed tensor.
        layout: what the spec promises.
        name: the format, for the message.

    Raises:
        ValueError: names the first part that is missing, unexpected, or of another shape or dtype.
    """
    for part, (shape, dtype) in layout.items():
        if part not in parts:
            raise ValueError(f"{name}: part {part!r} is missing")
        tensor = parts[part]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            raise ValueError(
                f"{name}: part {part!r} is {found}, expected {list(shape)} {str(dtype).removeprefix('torch.')}"
            )
    for part in parts:
        if part not in layout:
            raise ValueError(f"{name}: unexpected part {part!r}")


def check_mask(weight: Tensor, mask: Tensor) -> None:
    """Refuse anything but a matrix and a bool mask of the same shape (ValueError)."""
    if weight.ndim != 2:
        raise ValueError(f"a packed weight must be a matrix, got shape {list(weight.shape)}")
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"the mask must be bool {list(weight.shape)} like the weight, got {mask.dtype} {list(mask.shape)}"
        )
