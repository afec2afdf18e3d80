"""The output folder: checked before the run, written beside its final place, put there by one rename at the end."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

from torch import Tensor

from compressor.engine.journal import exclusive, write_atomically
from compressor.engine.tensorfile import Layout, header_bytes, order, read_header, read_tensor, write_file
from compressor.errors import NO_ROOM, UserError

ONE_FILE = 1 << 30  # bytes; smaller checkpoints end up in a single model.safetensors
WORKING_FILES = (
    r"survey-\d+|learning|lock|model|replaced"
    r"|(journal\.json|((states|mixer)-\d+|trained|logits|logits-long)\.safetensors|mixer-\d+\.json|distill\.pt)(\.tmp)?"
)
OURS = "report.json"  # a folder with this file was written by compressor

# What travels with the weights, unread and unchanged. Weights, index and configuration are ours to write.
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken", *LICENCES)
NOT_COMPANIONS = {"config.json", "report.json"}


def working_folder(output: Path) -> Path:
    """Where a run into ``output`` keeps its unfinished files: journal, hidden states, and ``model/``, the future
    output.
    """
    return output.with_name(output.name + ".partial")


def check_output(output: Path, source: Path, *, overwrite: bool, flag: str = "--output") -> None:
    """Refuse an output folder that must not or cannot be written.

    Args:
        flag: of the command line, that names it.

    Raises:
        UserError: it is (inside) the input, holds something else, is finished already, or is not writable.
    """
    target = output.resolve()
    if target == source.resolve() or source.resolve() in target.parents or target in source.resolve().parents:
        raise UserError(f"the output {output} is, contains or lies in the input folder", fix=f"choose another {flag}")
    if output.is_symlink():  # the rename at the end would replace the link, not what it points to
        raise UserError(f"{output} is a symbolic link", fix=f"give the folder it should point to, or another {flag}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (output / OURS).is_file():
            raise UserError(f"{output} exists and was not written by compressor", fix=f"choose another {flag}")
        if not overwrite:
            raise UserError(f"{output} exists already", fix="--overwrite replaces it")
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write to {parent}", fix=f"choose another {flag}")


def check_working(folder: Path) -> None:
    """Refuse a working folder that no run of ours has left: in the end it would be removed.

    Raises:
        UserError: names what it holds.
    """
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    strange = [name for name in names if not re.fullmatch(WORKING_FILES, name)]
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} exists and is no folder", fix="choose another --output")
    if strange:
        raise UserError(
            f"{folder} exists and was not left by a run (it holds {strange[0]!r})", fix="choose another --output"
        )


def clear_working(folder: Path) -> None:
    """Empty a working folder but for its lock, the journal first."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()


def check_disk(folder: Path, needed: int, *, flag: str = "--output") -> None:
    """Refuse when fewer than ``needed`` bytes are free where ``folder`` lies (or will lie).

    Args:
        flag: of the command line, that names it.

    Raises:
        UserError: names the bytes needed and free.
    """
    place = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{place} has {free / 1e9:.3g} GB free, the run needs {needed / 1e9:.3g} GB",
            fix=f"make room, or choose another {flag} on a larger disk",
        )


def shard_name(number: int, count: int) -> str:
    """Name of shard ``number`` (from 1) of ``count``."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_shard(
    folder: Path, number: int, count: int, layout: Layout, read: Callable[[str], Tensor], made_for: str = "pt"
) -> int:
    """Write one shard, tensor by tensor, and rename it into place. Returns its bytes."""
    return write_file(folder / shard_name(number, count), order(layout), read, made_for)


def finish_shards(folder: Path, count: int, made_for: str = "pt") -> None:
    """Join small shards into one file, or write the index over large ones. May be repeated after a kill."""
    shards = [folder / shard_name(number, count) for number in range(1, count + 1)]
    if (folder / "model.safetensors").exists():  # it is renamed into place when complete
        for shard in shards:
            shard.unlink(missing_ok=True)
        return
    entries = {name: entry for shard in shards for name, entry in read_header(shard).items()}
    total = sum(entry.nbytes for entry in entries.values())
    if total <= ONE_FILE:
        layout = order({name: (entry.dtype, entry.shape) for name, entry in entries.items()})
        write_file(folder / "model.safetensors", layout, lambda name: read_tensor(entries[name]), made_for)
        for shard in shards:
            shard.unlink()
        return
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: entries[name].file.name for name in sorted(entries)},
    }
    write_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def container_bytes(layouts: list[Layout]) -> int:
    """Bytes of the headers that the finished checkpoint will have, joined or not."""
    data = sum(_data_bytes(layout) for layout in layouts)
    if data <= ONE_FILE:
        layouts = [{name: facts for layout in layouts for name, facts in layout.items()}]
    return sum(len(header_bytes(order(layout))) for layout in layouts)


def _data_bytes(layout: Layout) -> int:
    return sum(prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def copy_companions(source: Path, folder: Path, patterns: Sequence[str] = COMPANIONS) -> list[str]:
    """Copy tokenizer, generation configuration, licence and remote code beside the weights, unchanged."""
    copied = []
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.name not in NOT_COMPANIONS and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
                copied.append(file.name)
    return sorted(set(copied))


@contextmanager
def building(output: Path) -> Iterator[Path]:
    """Give an empty folder, which takes its place as ``output`` when the body has ended without an error.

    For what is quickly made and begun anew after a kill; a run of hours keeps a journal (``run/session.py``). When the
    body fails, nothing is left.

    Raises:
        UserError: another process is at it, the working folder holds something that is not ours, or there is no room.
    """
    work = working_folder(output)
    check_working(work)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with exclusive(work):
            clear_working(work)
            folder = work / "model"
            folder.mkdir()
            try:
                yield folder
            except BaseException:  # half a folder is of no use, least of all on a disk that is full
                shutil.rmtree(work, ignore_errors=True)
                raise
            publish(folder, output)
    except OSError as error:
        if (reason := NO_ROOM.get(error.errno or 0)) is None:
            raise
        raise UserError(f"{output} was not written: {reason}", fix="make room and run the same again") from error
    shutil.rmtree(work, ignore_errors=True)


def publish(folder: Path, output: Path) -> None:
    """Put the finished folder in its final place by one rename; what stood there goes with the working folder."""
    old = folder.with_name("replaced")
    if output.exists():
        if old.exists():
            shutil.rmtree(old)
        output.rename(old)
    folder.rename(output)
