"""Integers in MLX's affine layout, for mlx-lm on Apple computers.

MLX has ``value = code * scale + bias`` with codes from 0 to 2^bits - 1, groups of 32, 64 or 128 consecutive inputs, and
2, 3, 4, 5, 6 or 8 bits. ``weight`` uint32 (m, n bits / 32) holds a row's codes in a stream of bits, lowest first, as
ours does; ``scales`` and ``biases`` (m, G) are of the dtype in which MLX computes. ``bias = -zero * scale``, which is a
power of two times the scale where grids are symmetric, and then exact in any dtype.

The numbers are the same. What MLX makes of them in bf16 or fp16 is rounded on the way (after the product and after the
sum, where it unpacks a matrix), as with every folder in this layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.engine.skeleton import Skeleton
from compressor.engine.tensorfile import Layout
from compressor.errors import UserError
from compressor.formats.group_int import pack_rows
from compressor.hf.reader import source_config
from compressor.run.export import Exported
from compressor.run.export_about import Use
from compressor.run.export_check import check_by_mlx
from compressor.run.export_folder import Laid, write_laid
from compressor.run.integers import Grid, Sorted, open_packed, read_integers, sort_matrices, spread
from compressor.run.mlx_config import FAMILIES, ignored_window, mlx_config

WIDTHS = (2, 3, 4, 5, 6, 8)
GROUPS = (128, 64, 32)
COMMAND = 'mlx_lm.generate --model PATH --prompt "Once there was"'

Place = tuple[int, int]
"""(bits, inputs a group) of a matrix in MLX's layout."""


def export_mlx(model: str, output: Path, *, verify: bool = True) -> Exported:
    """Write a packed model as mlx-lm reads it.

    Codes of 7 bits take 8, and wide groups are divided; the values stay. Pruned matrices become dense.

    Args:
        model: folder or hub id of a folder that compressor has written.
        output: must not exist.
        verify: let mlx-lm, where it is installed, load the folder before it takes its place, and compare logits.

    Raises:
        UserError: a family that mlx-lm has not or names otherwise; a matrix that is not made of integers in groups that
            MLX has, named with the reason; or a bad output.
    """
    skeleton = open_packed(model, "mlx")
    family = skeleton.config.model_type
    if family not in FAMILIES:
        raise UserError(f"the export for mlx-lm knows no {family} (it knows {', '.join(FAMILIES)})",
                        fix="--format dense writes what mlx_lm.convert reads")  # fmt: skip
    found = sort_matrices(skeleton, "mlx", _obstacle)
    places = {name: chosen for name, grid in found.integers.items() if (chosen := place(grid)) is not None}
    biases = _Rounding({})
    laid = {name: _laid(skeleton, name, grid, places[name], biases) for name, grid in found.integers.items()}
    source = source_config(skeleton.checkpoint.config)
    config = mlx_config(source, _quantization(places))

    def done(total: int) -> Exported:  # what biases were rounded is known when all have been made
        notes = _notes(found, places, biases, ignored_window(source))
        return Exported(len(laid), total, form="mlx", exact=not biases.steps, notes=notes)

    use = partial(_use, skeleton.checkpoint.folder, verify)
    return write_laid(skeleton, output, laid, config, done, use, skeleton.source_name, made_for="mlx")


def _use(source: Path, verify: bool, folder: Path) -> Use:
    found = check_by_mlx(source, folder, COMMAND) if verify else []
    tried = any(entry.passed for entry in found)
    return Use("" if tried else f"```sh\n{COMMAND}\n```", library="mlx", tag="mlx", runtimes=found)


def place(grid: Grid) -> Place | None:
    """Return bits and group in which MLX holds the integers of a matrix; None if its groups do not fit."""
    bits = next(width for width in WIDTHS if width >= grid.bits)
    group = next((group for group in GROUPS if grid.group % group == 0), None)
    return None if group is None else (bits, group)


@dataclass(frozen=True)
class _Rounding:
    """Biases that their dtype does not have: module path -> by how many steps of the grid they are off, at most."""

    steps: dict[str, float]


def _obstacle(module: str, grid: Grid) -> str | None:
    if place(grid) is None:
        return f"groups of {grid.group} inputs, and MLX has 32, 64 and 128"
    return None


def _laid(skeleton: Skeleton, module: str, grid: Grid, chosen: Place, biases: _Rounding) -> Laid:
    (m, n), (bits, group) = grid.shape, chosen
    facts: list[tuple[torch.dtype, tuple[int, ...]]] = [
        (torch.uint32, (m, n * bits // 32)),
        *2 * [(grid.dtype, (m, n // group))],
    ]
    names = [
        skeleton.source_name(f"{module}.weight").removesuffix("weight") + part
        for part in ("weight", "scales", "biases")
    ]
    layout: Layout = dict(zip(names, facts, strict=True))
    return Laid(layout, partial(_parts, skeleton, module, grid, chosen, names, biases))


def _parts(
    skeleton: Skeleton, module: str, grid: Grid, chosen: Place, names: list[str], biases: _Rounding
) -> dict[str, Tensor]:
    found, (bits, group) = read_integers(skeleton, module), chosen
    shift = 2 ** (bits - 1) - 2 ** (grid.bits - 1)  # where the codes take more bits than they need
    packed = pack_rows((found.codes.to(torch.int16) - shift).to(torch.int8), bits).view(torch.uint32)
    zero = torch.zeros_like(found.scale) if found.zero is None else found.zero.float()
    exact = -(zero + 2 ** (grid.bits - 1)) * found.scale  # of at most 8 by 11 significant bits: exact in fp32
    bias = exact.to(grid.dtype)
    if (off := float(((bias.float() - exact) / found.scale).abs().nan_to_num().max())) > 0:
        biases.steps[module] = off
    n = grid.shape[1]
    tensors = (packed, spread(found.scale, group, n).to(grid.dtype), spread(bias, group, n))
    return dict(zip(names, tensors, strict=True))


def _quantization(places: dict[str, Place]) -> dict[str, Any]:
    """Return ``quantization`` of config.json: the most common layout, and the modules that differ from it."""
    bits, group = max(sorted(set(places.values())), key=list(places.values()).count)
    others = {
        name: {"group_size": g, "bits": b, "mode": "affine"}
        for name, (b, g) in places.items()
        if (b, g) != (bits, group)
    }
    return {"group_size": group, "bits": bits, "mode": "affine", **others}


def _notes(found: Sorted, places: dict[str, Place], biases: _Rounding, window: int | None) -> tuple[str, ...]:
    wider = sum(places[name][0] > grid.bits for name, grid in found.integers.items())
    divided = sum(places[name][1] < grid.group for name, grid in found.integers.items())
    dtypes = sorted({str(grid.dtype).removeprefix("torch.") for grid in found.integers.values()})
    notes = [
        f"{wider} matrices take more bits a weight than they need, as MLX has no 7 bits" if wider else "",
        f"{divided} matrices have their groups divided into smaller ones with the same scale" if divided else "",
        f"{len(found.dense)} pruned matrices are stored dense" if found.dense else "",
        f"mlx-lm attends beyond the window of {window} tokens that this model has" if window else "",
    ]
    if biases.steps:
        most = max(biases.steps.values())
        notes.append(f"the biases of {len(biases.steps)} matrices are rounded to {', '.join(dtypes)}, by at most "
                     f"{most:.2g} of a step between two codes")  # fmt: skip
    return tuple(filter(None, notes))
