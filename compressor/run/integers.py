"""Packed matrices as plain integers: which of a folder's matrices are, and how they read where there are no others.

value = (code - zero) * scale, rounded once to the dtype of the matrix, as `compressor.formats.group_int` has it.
Besides its own format these are such integers, value by value:

- one plane of trits: -1, 0 and 1 are codes of 2 bits, and a scale may be rounded before it is taken times a trit;
- sparse integers: what was pruned has the code of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.engine.checkpoint import open_checkpoint, resolve_model
from compressor.engine.skeleton import Skeleton, build_skeleton
from compressor.errors import UserError
from compressor.formats import GroupInt
from compressor.formats.parts import Spec, parse_dtype
from compressor.formats.registry import tensor_name
from compressor.formats.representation import SparseInt
from compressor.formats.trit_planes import TritPlanes
from compressor.hf.compressed_tensors import QUANT_METHOD
from compressor.hf.linearized import linear_layers

PLAIN_ZEROS = ("bitmask", "nm", "dense")
"""Formats of pruned matrices: where integers are wanted they are stored dense, which loses nothing but bytes."""

NO_INTEGERS = {
    "trit-planes": "several planes of trits have several scales a group",
    "partial-binary": "signs and salient weights have grids of their own",
    "scaled-binary": "signs and salient inputs have grids of their own",
    "low-rank": "a product of two matrices",
    "sum": "a sum of codes and a product",
}


@dataclass(frozen=True)
class Grid:
    """How the integers of a matrix are spaced, known from its spec alone.

    Attributes:
        shape: (m, n).
        bits: of a code.
        group: inputs that share a scale; divides n.
        symmetric: whether code 0 is zero everywhere; else every group has a zero point.
        dtype: of the values.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    symmetric: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Sorted:
    """The packed matrices of a folder: those that are integers, and those that will be dense. Both by module path."""

    integers: dict[str, Grid]
    dense: tuple[str, ...]


def open_packed(model: str, form: str) -> Skeleton:
    """Open a folder that is to be written again as ``form``.

    Raises:
        UserError: nothing is packed in it, or it has layers that no other program knows.
    """
    checkpoint = open_checkpoint(resolve_model(model))
    skeleton = build_skeleton(checkpoint)
    if linear_layers(checkpoint.config):
        raise UserError(
            f"{model} has linearized attention, which no reader of {form} knows",
            fix="transformers loads it after 'import compressor', or with trust_remote_code=True",
        )
    if not skeleton.packed:
        raise UserError(f"nothing in {model} is packed", fix="give a folder that compressor has packed")
    if form == QUANT_METHOD and "quant_method" in (checkpoint.config.get("quantization_config") or {}):
        raise UserError(f"{model} is a folder of {form} already", fix="load it as it is")
    return skeleton


def sort_matrices(skeleton: Skeleton, form: str, obstacle: Callable[[str, Grid], str | None]) -> Sorted:
    """Say of every packed matrix how it will be stored, before anything large is read.

    Args:
        form: what is to be written, for messages.
        obstacle: (module path, grid) -> why ``form`` cannot hold these integers; None: it can.

    Raises:
        UserError: names the matrices that ``form`` cannot hold exactly, and why; or none is an integer matrix.
    """
    integers: dict[str, Grid] = {}
    dense: list[str] = []
    refused: dict[str, list[str]] = {}
    for module, spec in skeleton.packed.items():
        if spec["format"] in PLAIN_ZEROS:
            dense.append(module)
            continue
        grid, why = integer_grid(skeleton, module, spec)
        why = why if grid is None else obstacle(module, grid)
        if grid is not None and why is None:
            integers[module] = grid
        else:
            refused.setdefault(str(why), []).append(module)
    if refused:
        raise UserError(f"{form} cannot hold every matrix exactly: {_words(refused)}", fix="--format dense can")
    if not integers:
        raise UserError(f"no matrix of this folder is made of integers, so {form} has nothing to hold",
                        fix="--format dense writes it as a plain checkpoint")  # fmt: skip
    return Sorted(integers, tuple(dense))


def _words(refused: Mapping[str, list[str]]) -> str:
    reasons = []
    for why, names in refused.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        reasons.append(f"{names[0]}{more} ({why})")
    return "; ".join(reasons)


def integer_grid(skeleton: Skeleton, module: str, spec: Spec) -> tuple[Grid | None, str | None]:
    """Return the grid of a packed matrix and None, or None and why its values are no integers times a scale."""
    m, n = spec["shape"]
    dtype = parse_dtype(spec["dtype"])
    if skeleton.is_transposed(f"{module}.weight"):
        return None, "a layer that is stored transposed"
    if spec["format"] == "group-int":
        return Grid((m, n), spec["bits"], spec["group"], spec["symmetric"], dtype), None
    if spec["format"] == "trit-planes" and spec["planes"] == 1:
        if n % spec["group"]:
            return None, f"groups of {spec['group']} inputs do not divide {n}"
        return Grid((m, n), 2, spec["group"], True, dtype), None
    if spec["format"] == "sparse-int":
        low, high = _extremes(skeleton.checkpoint.read(tensor_name(module, "zero")))
        if high >= 2 ** spec["bits"] or low < 0:
            return None, "a zero point outside of the codes"
        scale = skeleton.checkpoint.read(tensor_name(module, "scale"))
        if not torch.equal(scale.to(dtype).float(), scale.float()):
            return None, f"scales in float16 that {str(dtype).removeprefix('torch.')} does not have"
        return Grid((m, n), spec["bits"], n, False, dtype), None
    return None, NO_INTEGERS.get(spec["format"], f"format {spec['format']}")


def _extremes(values: Tensor) -> tuple[int, int]:
    return (int(values.min()), int(values.max())) if values.numel() else (0, 0)


def read_integers(skeleton: Skeleton, module: str) -> GroupInt:
    """Read a packed matrix that `integer_grid` knows, as integers with the same values.

    Scales are fp32 numbers that the dtype of the matrix has; they are portable only where `group_int` stored them.
    """
    found = skeleton.representation(module)
    if isinstance(found, GroupInt):
        return found
    if isinstance(found, TritPlanes):  # as trits are -1, 0 and 1, rounding a scale is rounding the values
        dtype = parse_dtype(skeleton.packed[module]["dtype"])
        return GroupInt(found.trits[0], found.scale[0].to(dtype).float(), None, 2)
    if isinstance(found, SparseInt):
        low = 2 ** (found.bits - 1)
        zero = (found.zero.to(torch.int16) - low).to(torch.int8)[:, None]
        codes = (found.codes.to(torch.int16) - low).to(torch.int8)
        return GroupInt(torch.where(found.mask, codes, zero), found.scale.float()[:, None], zero, found.bits)
    raise ValueError(f"{module} is stored as {skeleton.packed[module]['format']}, which is no integers")


def spread(values: Tensor, group: int, n: int) -> Tensor:
    """Return scales or zero points (m, G) of ``n`` inputs repeated such that each is of ``group`` inputs."""
    return values.repeat_interleave(n // values.shape[1] // group, dim=1)
