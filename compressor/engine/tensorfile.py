"""Reading and writing ``.safetensors`` files a tensor at a time, by plain file reads.

The safetensors library maps whole files into memory: a 140 GB checkpoint then needs 140 GB of address space, and pages
that merely passed by count as the process's own memory. Here a file costs its header, and a tensor costs itself.
Format: 8 bytes little-endian header length, JSON header ``{name: {dtype, shape, data_offsets}}``, data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
AGAIN = "fetch the file again"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
LFS = b"version "  # how a pointer of Git LFS begins, which no header does


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``nbytes`` bytes from byte ``start`` of ``file``."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of data on disk."""
        return self.numel * self.dtype.itemsize

    def row(self, index: int) -> TensorEntry:
        """Where the part ``index`` along the first dimension lies."""
        size = self.nbytes // self.shape[0]
        return TensorEntry(self.name, self.file, self.dtype, self.shape[1:], self.start + index * size)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of a safetensors file.

    Raises:
        UserError: the file is unreadable, truncated, or its header contradicts its size.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(first := file.read(8), "little")
            if first == LFS:
                raise UserError(
                    f"{path.name} is only a pointer of Git LFS", fix="git lfs pull, or fetch the model again"
                )
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise UserError(f"{path.name} is not a safetensors file or is truncated", fix="fetch it again")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", fix="check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} has a corrupt safetensors header", fix="fetch it again") from error
    if not isinstance(header, dict):
        raise UserError(f"{path.name} has a corrupt safetensors header", fix="fetch it again")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, facts, 8 + length, size) for name, facts in header.items()}
    place = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != place:
            raise UserError(f"{path.name}: tensor {entry.name!r} overlaps another one or leaves a gap", fix=AGAIN)
        place += entry.nbytes
    if place != size:
        raise UserError(f"{path.name} has {size - place} bytes behind its last tensor", fix=AGAIN)
    return entries


def _entry(path: Path, name: str, facts: Any, data_start: int, file_size: int) -> TensorEntry:
    try:
        dtype = DTYPES[facts["dtype"]]
        shape = tuple(index(side) for side in facts["shape"])
        begin, end = (index(offset) for offset in facts["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path.name}: tensor {name!r} has an unreadable entry {str(facts)[:99]}", fix=AGAIN) from error
    entry = TensorEntry(name, path, dtype, shape, data_start + begin)
    if begin < 0 or min(shape, default=0) < 0 or end - begin != entry.nbytes:
        raise UserError(
            f"{path.name}: tensor {name!r} of shape {list(shape)} needs {entry.nbytes} bytes, "
            f"the header gives it {end - begin}",
            fix=AGAIN,
        )
    if data_start + end > file_size:
        raise UserError(
            f"{path.name} is truncated: tensor {name!r} ends at byte {data_start + end} of {file_size}",
            fix=AGAIN,
        )
    return entry


def read_tensor(entry: TensorEntry) -> Tensor:
    """Read one tensor into fresh memory, in its stored dtype and shape."""
    data = torch.empty(entry.nbytes, dtype=torch.uint8)
    if entry.nbytes:
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            view = data.numpy().data
            filled = 0
            while filled < entry.nbytes:
                got = file.readinto(view[filled:])  # one call reads at most 2 GiB
                if not got:
                    raise UserError(f"{entry.file.name} ended inside tensor {entry.name!r}", fix=AGAIN)
                filled += got
    return data.view(entry.dtype).reshape(entry.shape)


Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def header_bytes(layout: Layout, made_for: str = "pt") -> bytes:
    """Return the exact first bytes of a file that holds ``layout`` in this order, padded to a multiple of 8.

    ``made_for`` is the library that the file says it is of: ``pt`` or ``mlx``.
    """
    header: dict[str, Any] = {"__metadata__": {"format": made_for}}
    offset = 0
    for name, (dtype, shape) in layout.items():
        size = prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def order(layout: Layout) -> Layout:
    """Sort a layout by descending element size, then name: every tensor is aligned, and the bytes are canonical."""
    return dict(sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])))


def layout_of(tensors: Iterable[tuple[str, Tensor]]) -> Layout:
    """Describe tensors in the order in which :func:`write_file` stores them."""
    return order({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors})


def write_file(path: Path, layout: Layout, read: Callable[[str], Tensor], made_for: str = "pt") -> int:
    """Write a safetensors file, one tensor in memory at a time, under a temporary name that is renamed at the end.

    Args:
        layout: name -> (dtype, shape), in storage order (see :func:`order`).
        read: gives the tensor of a name when its turn comes.
        made_for: see :func:`header_bytes`.

    Returns:
        Bytes written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(header_bytes(layout, made_for))
        for name, (dtype, shape) in layout.items():
            tensor = read(name).detach().cpu().contiguous()
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    temporary.replace(path)
    return size
