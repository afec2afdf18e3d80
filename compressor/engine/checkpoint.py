"""A checkpoint folder, seen through its headers: what it holds, checked, without reading a weight."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.engine.hub import fetch
from compressor.engine.hub_names import parse_name
from compressor.engine.tensorfile import TensorEntry, read_header, read_tensor
from compressor.errors import UserError

EMBEDDED = "embedded"
STANDARD = "model.safetensors"


def resolve_model(name: str, *, revision: str | None = None) -> Path:
    """Find the folder of ``name``: a local folder, the embedded model, or a hub id (downloaded or from the cache).

    Args:
        name: a hub id may end in ``@`` and a branch, tag or commit.
        revision: the same, given apart.

    Raises:
        UserError: there is no such folder, or a revision of it is asked for, or the hub has no such model or cannot be
            reached (see :mod:`compressor.engine.hub`).
    """
    folder = Path(name).expanduser()
    if name == EMBEDDED:
        folder = Path(__file__).resolve().parent.parent / "embedded"
    elif not folder.exists():
        if (model := parse_name(name, revision)) is None:
            raise UserError(
                f"no model at {name!r}",
                fix="give a local folder, a hub id like 'org/name' or 'org/name@revision', or 'embedded'",
            )
        return fetch(model)
    if revision is not None:
        raise UserError(f"{name} is a local folder, which has no revisions", fix="leave --revision out")
    if not folder.is_dir():
        raise UserError(f"{name!r} is a file, not a model folder", fix="give the folder that holds config.json")
    return folder.resolve()


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder by name, and its ``config.json``.

    Attributes:
        folder: the folder.
        config: content of config.json.
        tensors: name -> where it lies: ``shape``, ``dtype``, ``nbytes``. Nothing is read until ``read(name)``.
        files: the weight files.
        pickled: tensor name -> the .bin file that holds it, where there is no safetensors.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: tuple[Path, ...]
    pickled: dict[str, Path] = field(default_factory=dict)

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> Tensor:
        """Read one tensor, or an indexed part of it, in its stored dtype. ``name`` must be one of :attr:`tensors`."""
        if name in self.pickled:
            return _load_pickle(self.pickled[name], "cpu")[name][index].clone()
        entry = self.tensors[name]
        if index and isinstance(index[0], int):  # one expert of many: its bytes alone
            entry, index = entry.row(index[0]), index[1:]
        tensor = read_tensor(entry)
        return tensor[index].clone() if index else tensor

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of the weight files, headers included."""
        return sum(file.stat().st_size for file in self.files)

    def digest(self) -> Iterator[tuple[str, int, str | None]]:
        """Read every tensor once; yield ``(name, bytes, problem)``, and finally ``("", 0, hex digest)``.

        ``problem`` names NaN or infinite values; the digest covers names, dtypes, shapes and data.
        """
        total = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.read(name)
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            if tensor.numel():
                total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            finite = not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or _all_finite(tensor)
            yield name, self.tensors[name].nbytes, None if finite else "holds NaN or infinite values"
        yield "", 0, total.hexdigest()


def _all_finite(tensor: Tensor) -> bool:
    flat = tensor.reshape(-1)
    return all(bool(torch.isfinite(piece).all()) for piece in torch.split(flat, 1 << 24))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read ``config.json`` and every header of a model folder.

    Args:
        folder: on this disk; `resolve_model` finds that of a hub id.

    Raises:
        UserError: not a model folder, a missing shard, an index that names files outside the folder, a corrupt or
            truncated file, or a tensor named twice.
    """
    if not (folder / "config.json").exists() and (gguf := next(folder.glob("*.gguf"), None)) is not None:
        raise UserError(f"{folder} holds gguf ({gguf.name})", fix="give the folder or model it was made from")
    config = _read_json(folder / "config.json", "not a model folder: it has no config.json")
    indexes = sorted(folder.glob("*.safetensors.index.json"), key=lambda file: file.name != STANDARD + ".index.json")
    index = None if (folder / STANDARD).is_file() else next(iter(indexes), None)  # where transformers looks first
    if (folder / STANDARD).is_file():
        files = [folder / STANDARD]
    elif index:
        files = _indexed_files(folder, index)
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        return _open_pickled(folder, config)
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in tensors:
                raise UserError(
                    f"tensor {name!r} is in both {tensors[name].file.name} and {file.name}", fix="remove the stale file"
                )
            tensors[name] = entry
    if index:
        _check_index(index, tensors)
    if not tensors:
        raise UserError(f"{folder.name} holds no tensors", fix="fetch it again")
    return Checkpoint(folder, config, tensors, tuple(files))


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is {missing}", fix="give the folder that holds config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}", fix="fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object", fix="fetch it again")
    return content


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    weight_map = _read_json(index, "without its index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index.name} has no usable weight_map", fix="fetch it again")
    files = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise UserError(
                f"{index.name} names a file outside the folder: {name!r}", fix="do not trust this checkpoint"
            )
        if not (folder / name).is_file():
            raise UserError(f"shard {name} is missing from {folder}", fix="fetch the checkpoint again")
        files.append(folder / name)
    return files


def _check_index(index: Path, tensors: dict[str, TensorEntry]) -> None:
    for name, file in _read_json(index, "without its index")["weight_map"].items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{index.name} puts {name!r} in {file}, which does not hold it", fix="fetch it again")


def _open_pickled(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """Old ``.bin`` checkpoints: tensors only (``weights_only=True``), never arbitrary pickles."""
    if (index := folder / "pytorch_model.bin.index.json").is_file():
        files = _indexed_files(folder, index)
    else:
        files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(
            f"{folder} has a config.json but no weights (*.safetensors or pytorch_model*.bin)", fix="fetch it again"
        )
    tensors: dict[str, TensorEntry] = {}
    origin: dict[str, Path] = {}
    for file in files:
        for name, tensor in _load_pickle(file, "meta").items():
            tensors[name] = TensorEntry(name, file, tensor.dtype, tuple(tensor.shape), 0)
            origin[name] = file
    return Checkpoint(folder, config, tensors, tuple(files), origin)


def _load_pickle(path: Path, device: str) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise UserError(
            f"{path.name} cannot be read as plain tensors ({type(error).__name__}); compressor never unpickles code",
            fix="convert the checkpoint to safetensors",
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} does not hold named tensors", fix="convert the checkpoint to safetensors")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
