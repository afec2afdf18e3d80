"""Integers of our own kind of folder as compressed-tensors packs them: stock transformers and vLLM load the result.

A folder of symmetric group integers is written so from the start (`run/container.py`); here are those that were not.
Zero points are not written, since transformers reads them only with ``dequantize=True``: an offset from one needs a bit
more than a code, so the matrix becomes one of symmetric integers of a bit more, with the same values.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from compressor.engine.skeleton import Skeleton
from compressor.formats.group_int import layout_group_int, pack_rows
from compressor.formats.parts import Spec, dtype_name
from compressor.formats.registry import tensor_name
from compressor.hf.compressed_tensors import QUANT_METHOD, quantization_config
from compressor.hf.reader import source_config
from compressor.run.export import Exported
from compressor.run.export_about import Use, by_transformers
from compressor.run.export_check import check_by_transformers
from compressor.run.export_folder import Laid, write_laid
from compressor.run.integers import Grid, open_packed, read_integers, sort_matrices

MOST_BITS = 8


def export_compressed_tensors(model: str, output: Path, *, verify: bool = True) -> Exported:
    """Write a packed model in the format ``pack-quantized`` of compressed-tensors, each matrix with the same values.

    Integers stay packed. Pruned matrices become dense, since the format has no zeros to leave out, and so do
    embeddings: with them packed transformers 5.24 stops ("'Embedding' object has no attribute 'weight'").

    Args:
        model: folder or hub id of a folder that compressor has written.
        output: must not exist.
        verify: let a fresh process load the folder before it takes its place, and compare logits.

    Raises:
        UserError: a matrix that is not made of integers, named with the reason; nothing to write; or a bad output.
    """
    skeleton = open_packed(model, QUANT_METHOD)
    found = sort_matrices(skeleton, QUANT_METHOD, _obstacle)
    layers = set(skeleton.all_linears())
    embeddings = sorted(set(found.integers) - layers)
    specs = {name: _spec(grid) for name, grid in found.integers.items() if name in layers}
    left_out = [name for name in skeleton.all_linears() if name not in specs]
    config = {
        **source_config(skeleton.checkpoint.config),
        "quantization_config": quantization_config(specs, left_out),
    }
    laid = {name: Laid(_layout(name, spec), partial(_parts, skeleton, name, spec)) for name, spec in specs.items()}
    wider = sum(not found.integers[name].symmetric for name in specs)
    notes = [
        f"{wider} matrices with zero points are stored with one more bit a weight" if wider else "",
        f"{len(found.dense)} pruned matrices are stored dense" if found.dense else "",
        f"{', '.join(embeddings)} is stored dense: readers stop at a packed embedding" if embeddings else "",
    ]
    told = tuple(filter(None, notes))
    return write_laid(
        skeleton,
        output,
        laid,
        config,
        lambda total: Exported(len(specs), total, form="compressed-tensors", notes=told),
        partial(_use, skeleton.checkpoint.folder, verify),
    )


def _use(source: Path, verify: bool, folder: Path) -> Use:
    found = check_by_transformers(source, folder, QUANT_METHOD, "compressed-tensors") if verify else []
    made_for = "" if found else by_transformers(QUANT_METHOD)
    return Use(made_for, library="transformers", tag=QUANT_METHOD, runtimes=found)


def _obstacle(module: str, grid: Grid) -> str | None:
    if not grid.symmetric and grid.bits == MOST_BITS:
        return "zero points beside codes of 8 bits"
    return None


def _spec(grid: Grid) -> Spec:
    return {
        "format": "group-int",
        "shape": list(grid.shape),
        "dtype": dtype_name(grid.dtype),
        "bits": grid.bits if grid.symmetric else grid.bits + 1,
        "group": grid.group,
        "symmetric": True,
    }


def _layout(module: str, spec: Spec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {tensor_name(module, part): (dtype, shape) for part, (shape, dtype) in layout_group_int(spec).items()}


def _parts(skeleton: Skeleton, module: str, spec: Spec) -> dict[str, Tensor]:
    found = read_integers(skeleton, module)
    codes = found.codes
    if found.zero is not None:
        zero = found.zero.repeat_interleave(spec["group"], dim=1)
        codes = (codes.to(torch.int16) - zero).to(torch.int8)  # within 2^bits of zero: a bit more holds it
    parts = {
        "packed": pack_rows(codes, spec["bits"]),
        "scale": found.scale.to(skeleton.stored(f"{module}.weight")[0]),
        "shape": torch.tensor(spec["shape"], dtype=torch.int64),
    }
    return {tensor_name(module, part): tensor for part, tensor in parts.items()}
