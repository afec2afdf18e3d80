"""Token ids that were made beforehand: ``.npy`` and ``.safetensors`` files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compressor.errors import UserError, nearest

_USUAL = ("input_ids", "ids", "tokens")
_INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.int64, torch.uint64)


def read_ids(path: Path, field: str | None) -> Tensor:
    """Return the ids of ``path``: a stream (tokens,) or windows (N, L), int64.

    ``field`` names the tensor of a ``.safetensors`` file; otherwise it is the only one, or one of the usual names.

    Raises:
        UserError: unreadable, no such tensor, not whole numbers, wrong number of dimensions, empty.
    """
    ids = _from_numpy(path) if path.suffix.lower() == ".npy" else _from_safetensors(path, field)
    if ids.dtype not in _INTEGERS:
        raise UserError(
            f"{path}: holds {ids.dtype}, expected whole-number token ids", fix="store them as int32 or int64"
        )
    if ids.dim() not in (1, 2):
        raise UserError(
            f"{path}: has shape {list(ids.shape)}, expected (tokens,) or (windows, length)", fix="reshape it"
        )
    if not ids.numel():
        raise UserError(f"{path}: is empty", fix="give a file with token ids to --calibration")
    return ids.to(torch.int64)


def _from_numpy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: is not a readable .npy file ({error})", fix="give another --calibration") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        kind = getattr(array, "dtype", type(array).__name__)
        raise UserError(f"{path}: holds {kind}, expected whole-number token ids", fix="store them as int32 or int64")
    # int64 in native byte order: torch takes neither big-endian nor every unsigned type
    return torch.from_numpy(np.ascontiguousarray(array.astype(np.int64)))


def _from_safetensors(path: Path, field: str | None) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            name = _pick(path, names, field)
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: is not a readable .safetensors file ({error})", fix="give another --calibration"
        ) from error


def _pick(path: Path, names: list[str], field: str | None) -> str:
    if field is not None:
        if field not in names:
            raise UserError(f"{path}: no tensor {field!r}{nearest(field, names)}", fix="name one with :field=NAME")
        return field
    for name in _USUAL:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    raise UserError(f"{path}: cannot tell which tensor holds the ids ({', '.join(names)})", fix="add :field=NAME")
