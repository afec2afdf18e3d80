"""Write a packed folder again as a plain checkpoint of dense matrices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from compressor.engine.checkpoint import open_checkpoint, resolve_model
from compressor.engine.names import fused_origin
from compressor.engine.output import (
    ONE_FILE,
    building,
    check_disk,
    copy_companions,
    finish_shards,
    write_shard,
)
from compressor.engine.skeleton import Skeleton, build_skeleton
from compressor.engine.tensorfile import Layout
from compressor.errors import UserError
from compressor.hf.manifest import MODEL_TYPE
from compressor.run.container import folder_config
from compressor.run.export import Exported, check_place
from compressor.run.export_about import Use, by_transformers, write_about
from compressor.run.export_check import check_by_transformers
from compressor.run.write import write_config


@dataclass(frozen=True)
class Piece:
    """A module tensor, and its place in the tensor of a plain checkpoint that holds it: () is the whole."""

    module_tensor: str
    index: tuple[int | slice, ...] = ()


def export_dense(model: str, output: Path, *, verify: bool = True) -> Exported:
    """Write a packed model as a plain checkpoint, under the names and in the dtypes of its source.

    Every matrix is the one that the packed layer reads as its ``weight``. One tensor of the result is in memory at a
    time; a mixture's fused experts are one tensor.

    Args:
        model: folder or hub id of a folder that compressor has written, or of symmetric integers in the layout of
            compressed-tensors.
        output: must not exist.
        verify: let a fresh process load the folder before it takes its place, and compare logits.

    Raises:
        UserError: nothing is packed in the model, no causal language model, or a bad output.
    """
    checkpoint = open_checkpoint(resolve_model(model))
    skeleton = build_skeleton(checkpoint)
    if not skeleton.packed and checkpoint.config.get("model_type") != MODEL_TYPE:
        raise UserError(f"{model} is a plain checkpoint already", fix="give a folder that compressor has packed")
    check_place(output, checkpoint.folder)
    apart = names_of_experts(skeleton.model) if skeleton.experts else []
    shards = [_shard(skeleton, names, apart) for names in _groups(skeleton)]
    _carry_over(skeleton, shards[0][0])
    total = sum(prod(shape) * dtype.itemsize for layout, _ in shards for dtype, shape in layout.values())
    check_disk(output, total + min(total, ONE_FILE), flag="DEST")
    with building(output) as folder:
        for number, (layout, pieces) in enumerate(shards, 1):
            reader = _Reader(skeleton, layout, pieces)
            write_shard(folder, number, len(shards), layout, reader.read)
        finish_shards(folder, len(shards))
        copy_companions(checkpoint.folder, folder)
        config = folder_config(skeleton, {})
        write_config(folder, config)
        own = config.get("model_type") == MODEL_TYPE  # linearized: plain matrices, but attention of ours
        done = Exported(len(skeleton.packed), total, form="dense")
        found = (
            check_by_transformers(checkpoint.folder, folder, "dense", "compressor" if own else "plain")
            if verify
            else []
        )
        made_for = "" if found else by_transformers("compressor" if own else "")
        return write_about(folder, checkpoint.folder, done, Use(made_for, library="transformers", runtimes=found))


def _groups(skeleton: Skeleton) -> Iterator[list[str]]:
    """Module tensors by the shard they go to: those outside the blocks, then block by block."""
    yield skeleton.outer_tensors()
    for block in range(len(skeleton.block_names)):
        yield skeleton.block_tensors(block)


def _shard(skeleton: Skeleton, names: list[str], apart: list[re.Pattern[str]]) -> tuple[Layout, dict[str, list[Piece]]]:
    """What a shard holds, and of which module tensors each of its tensors is made."""
    layout: Layout = {}
    pieces: dict[str, list[Piece]] = {}
    for name in names:
        target, index = skeleton.source_name(name), skeleton.origins[name].index
        entry = skeleton.source_layout(name)
        of_expert = None if index else fused_origin(name)
        if of_expert is not None and not any(pattern.search(target) for pattern in apart):
            (dtype, (rows, columns)), (target, index_in) = skeleton.stored(name), of_expert
            experts = len(list(skeleton.model.get_submodule(target.rpartition(".")[0]).children()))
            shape = (experts, rows if target.endswith("down_proj") else 2 * rows, columns)
            index, entry = index_in(shape), (dtype, shape)
        layout[target] = entry
        pieces.setdefault(target, []).append(Piece(name, index))
    return layout, pieces


def names_of_experts(model: torch.nn.Module) -> list[re.Pattern[str]]:
    """Names of the tensors of single experts that transformers joins when it loads a model of this family.

    A family without them stores its experts joined, and so must we: transformers would ignore any other names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    joined = re.compile(r"experts\.(gate_up_proj|down_proj)")
    return [
        re.compile(str(pattern).replace(".*.", r"\.\d+\."))
        for conversion in get_model_conversion_mapping(model)
        if any(joined.search(str(target)) for target in conversion.target_patterns)
        for pattern in conversion.source_patterns
    ]


def _carry_over(skeleton: Skeleton, layout: Layout) -> None:
    for name in skeleton.extra:
        entry = skeleton.checkpoint.tensors[name]
        layout[name] = (entry.dtype, entry.shape)


@dataclass(frozen=True)
class _Reader:
    """Makes the tensors of one shard."""

    skeleton: Skeleton
    layout: Layout
    pieces: dict[str, list[Piece]]

    def read(self, target: str) -> Tensor:
        """Return a tensor in the dtype and shape of the layout."""
        if target not in self.pieces:  # the model does not know it
            return self.skeleton.checkpoint.read(target)
        first = self.pieces[target][0]
        if not first.index:
            return self.skeleton.read(first.module_tensor)
        dtype, shape = self.layout[target]
        joined = torch.empty(shape, dtype=dtype)
        for piece in self.pieces[target]:
            joined[piece.index] = self.skeleton.read(piece.module_tensor)
        return joined
