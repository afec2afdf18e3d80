"""Integers in the layout of GPTQ, for the runtimes that read no other.

A linear layer with inputs n and outputs m has ``qweight`` int32 (n bits / 32, m), the codes from 0 to 2^bits - 1 of
each column in a stream of bits, lowest first; ``scales`` fp16 (G, m); ``qzeros`` int32 (G, m bits / 32), a stream along
the outputs; and ``g_idx`` int32 (n,), the group of every input. value = (code - zero) * scale.

There are two versions, which differ in the zero points alone. The first (``checkpoint_format: gptq``) stores one less
than they are, and so cannot say 0: it is written for symmetric grids, whose zero point is 2^(bits-1). Others are
written in the second (``gptq_v2``).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.engine.skeleton import NOT_COMPRESSED, Skeleton
from compressor.engine.tensorfile import Layout
from compressor.errors import UserError
from compressor.formats.group_int import pack_rows
from compressor.hf.reader import source_config
from compressor.run.export import Exported
from compressor.run.export_about import Use
from compressor.run.export_folder import Laid, write_laid
from compressor.run.integers import Grid, Sorted, open_packed, read_integers, sort_matrices

WIDTHS = (2, 3, 4, 8)
"""Bits of a code whose layout all runtimes agree on."""

GROUPS = (16, 32, 64, 128, 256, 512, 1024)
"""Inputs that may share a scale, besides whole rows."""

Kind = tuple[int, int, bool]
"""(bits, inputs a group or -1 for whole rows, symmetric): one for the whole folder."""


def export_gptq(model: str, output: Path, *, verify: bool = True) -> Exported:
    """Write a packed model in the layout of GPTQ. Embeddings and the head become dense.

    Args:
        model: folder or hub id of a folder that compressor has written.
        output: must not exist.
        verify: has no effect: there is no program to try it with.

    Raises:
        UserError: a matrix that is not made of such integers, or is not of the same kind as the others, named with the
            reason; a linear layer of a block that is not packed; a mixture of experts; or a bad output.
    """
    skeleton = open_packed(model, "gptq")
    if skeleton.experts:
        raise UserError(f"{model} is a mixture of experts, which --format gptq does not write", fix="--format dense")
    inside = {linear.name for linear in skeleton.linears}
    found = sort_matrices(skeleton, "gptq", partial(_obstacle, inside))
    grids = {name: grid for name, grid in found.integers.items() if name in inside}
    kind = _one_kind(skeleton, grids)
    laid = {name: _laid(skeleton, name, grid, kind) for name, grid in grids.items()}
    config = {**source_config(skeleton.checkpoint.config), "quantization_config": quantization_config(kind)}
    use = Use(
        "The layout of GPTQ's checkpoints (`quant_method: gptq` in config.json), for programs that read those.",
        tag="gptq",
    )
    return write_laid(
        skeleton,
        output,
        laid,
        config,
        lambda total: Exported(len(laid), total, form="gptq", notes=_notes(found, inside)),
        lambda folder: use,
        skeleton.source_name,
    )


def quantization_config(kind: Kind) -> dict[str, Any]:
    """Return the ``quantization_config`` of config.json."""
    bits, group, symmetric = kind
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": False,
        "true_sequential": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
    }


def kind_of(grid: Grid) -> Kind:
    """Return what GPTQ calls a grid."""
    return grid.bits, -1 if grid.group == grid.shape[1] else grid.group, grid.symmetric


def _obstacle(inside: set[str], module: str, grid: Grid) -> str | None:
    (m, n), (bits, group, _) = grid.shape, kind_of(grid)
    if module not in inside:  # it will be dense
        return None
    if bits not in WIDTHS:
        return f"codes of {bits} bits, and GPTQ has 2, 3, 4 and 8"
    if group not in (-1, *GROUPS):
        return f"groups of {group} inputs, and GPTQ has 16 to 1024 in powers of two, and whole rows"
    if m % 32 or n % 32:
        return f"sides of {m} x {n}, which are no multiples of 32"
    return None


def _one_kind(skeleton: Skeleton, grids: dict[str, Grid]) -> Kind:
    kinds: dict[Kind, str] = {}
    alike = len({grid.group for grid in grids.values()}) == 1
    whole = all(grid.group == grid.shape[1] for grid in grids.values())
    for name, grid in grids.items():  # where a row of some matrices is one group, that is no other grid
        kind = (grid.bits, grid.group, grid.symmetric) if alike and not whole else kind_of(grid)
        kinds.setdefault(kind, name)
    if len(kinds) > 1:
        words = "; ".join(f"{name} has {_words(kind)}" for kind, name in kinds.items())
        raise UserError(
            f"gptq has one grid for all matrices of a folder: {words}",
            fix="quantize all with the same --bits and --group, or choose --format compressed-tensors",
        )
    left = [linear.name for linear in skeleton.linears if linear.name not in grids]
    left = [name for name in left if not NOT_COMPRESSED.search(name)]
    if left or not kinds:
        more = f" and {len(left) - 1} more are" if len(left) > 1 else " is"
        raise UserError(f"readers of gptq expect every linear layer of a block in integers; {left[0]}{more} not",
                        fix="--format compressed-tensors can leave some out")  # fmt: skip
    return next(iter(kinds))


def _words(kind: Kind) -> str:
    bits, group, symmetric = kind
    rows = "whole rows" if group == -1 else f"groups of {group}"
    return f"{bits} bits in {rows}, {'symmetric' if symmetric else 'with zero points'}"


def _laid(skeleton: Skeleton, module: str, grid: Grid, kind: Kind) -> Laid:
    (m, n), bits = grid.shape, grid.bits
    groups = n // grid.group
    prefix = skeleton.source_name(f"{module}.weight").removesuffix("weight")
    layout: Layout = {
        f"{prefix}qweight": (torch.int32, (n * bits // 32, m)),
        f"{prefix}qzeros": (torch.int32, (groups, m * bits // 32)),
        f"{prefix}scales": (torch.float16, (groups, m)),
        f"{prefix}g_idx": (torch.int32, (n,)),
    }
    return Laid(layout, partial(_parts, skeleton, module, grid, list(layout), kind[2]))


def _parts(skeleton: Skeleton, module: str, grid: Grid, names: list[str], symmetric: bool) -> dict[str, Tensor]:
    found = read_integers(skeleton, module)
    scale = found.scale.half()
    if not torch.equal(scale.float(), found.scale):
        raise ValueError(f"{module}: a scale that fp16 does not have")  # all are portable, or were fp16 before
    zero = torch.zeros_like(found.scale, dtype=torch.int8) if found.zero is None else found.zero
    zero = zero - 1 if symmetric else zero
    tensors = (
        pack_rows(found.codes, grid.bits).T.contiguous(),
        pack_rows(zero.T.contiguous(), grid.bits),
        scale.T.contiguous(),
        (torch.arange(grid.shape[1]) // grid.group).to(torch.int32),
    )
    return dict(zip(names, tensors, strict=True))


def _notes(found: Sorted, inside: set[str]) -> tuple[str, ...]:
    outside = sorted(set(found.integers) - inside)
    notes = ["not tried with a GPTQ runtime: the layout is held to its definition"]
    if outside:
        notes.append(f"{', '.join(outside)} is stored dense")
    return tuple(notes)
