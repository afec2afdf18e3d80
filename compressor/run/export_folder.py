"""Write a packed folder again with some of its matrices in the layout of another program, and everything else dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.engine.output import (
    ONE_FILE,
    building,
    check_disk,
    copy_companions,
    finish_shards,
    write_shard,
)
from compressor.engine.skeleton import Skeleton
from compressor.engine.tensorfile import Layout
from compressor.run.export import Exported, check_place
from compressor.run.export_about import Use, write_about
from compressor.run.write import write_config


@dataclass(frozen=True)
class Laid:
    """One matrix in the layout of another program: its tensors' facts beforehand, themselves when their turn comes."""

    layout: Layout
    make: Callable[[], dict[str, Tensor]]


def write_laid(
    skeleton: Skeleton,
    output: Path,
    laid: Mapping[str, Laid],
    config: dict[str, Any],
    done: Callable[[int], Exported],
    use: Callable[[Path], Use],
    name: Callable[[str], str] = str,
    made_for: str = "pt",
) -> Exported:
    """Write the folder, which appears under its name when it is complete. The coded matrices of a block are in memory.

    Args:
        output: must not exist.
        laid: module path -> its layout; all other tensors of the model are written dense, in their own dtypes.
        config: the content of config.json.
        done: bytes of all tensors -> what to tell of it, asked for when all are written.
        use: how the finished folder is loaded; may try it, and refuse it by raising.
        name: module tensor -> its name in the files, for the dense ones.
        made_for: the library that the files say they are of.

    Raises:
        UserError: a bad output, or a full disk.
    """
    check_place(output, skeleton.checkpoint.folder)
    groups = [skeleton.outer_tensors(), *(skeleton.block_tensors(block) for block in range(len(skeleton.block_names)))]
    shards = [_Shard(skeleton, {name(tensor): tensor for tensor in tensors}, laid) for tensors in groups]
    shards[0].extra.extend(skeleton.extra)
    layouts = [shard.layout() for shard in shards]
    total = sum(prod(shape) * dtype.itemsize for layout in layouts for dtype, shape in layout.values())
    check_disk(output, total + min(total, ONE_FILE), flag="DEST")
    with building(output) as folder:
        for number, (shard, layout) in enumerate(zip(shards, layouts, strict=True), 1):
            write_shard(folder, number, len(shards), layout, shard.read, made_for)
            shard.made.clear()
        finish_shards(folder, len(shards), made_for)
        copy_companions(skeleton.checkpoint.folder, folder)
        write_config(folder, config)
        return write_about(folder, skeleton.checkpoint.folder, done(total), use(folder))


@dataclass(frozen=True)
class _Shard:
    """Makes the tensors of one shard. ``tensors``: name in the file -> module tensor."""

    skeleton: Skeleton
    tensors: dict[str, str]
    laid: Mapping[str, Laid]
    extra: list[str] = field(default_factory=list)
    made: dict[str, Tensor] = field(default_factory=dict)

    def layout(self) -> Layout:
        found: Layout = {}
        for target, name in self.tensors.items():
            if (laid := self._laid(name)) is not None:
                found |= laid.layout
            else:
                found[target] = self.skeleton.stored(name)
        for name in self.extra:
            entry = self.skeleton.checkpoint.tensors[name]
            found[name] = (entry.dtype, entry.shape)
        return found

    def read(self, target: str) -> Tensor:
        if target in self.tensors and self._laid(self.tensors[target]) is None:
            return self.skeleton.read(self.tensors[target])
        if target in self.extra:
            return self.skeleton.checkpoint.read(target)
        if target not in self.made:
            self.made.update(next(laid for laid in self._all_laid() if target in laid.layout).make())
        return self.made.pop(target)

    def _laid(self, name: str) -> Laid | None:
        module, _, leaf = name.rpartition(".")
        return self.laid.get(module) if leaf == "weight" else None

    def _all_laid(self) -> list[Laid]:
        return [laid for name in self.tensors.values() if (laid := self._laid(name)) is not None]
