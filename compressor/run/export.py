"""Writing a folder again in a form that other programs read: which forms there are, and what an export tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from compressor.engine.output import check_output
from compressor.errors import UserError, nearest
from compressor.report.schema_use import Runtime

FORMS: dict[str, tuple[str, str]] = {
    "dense": ("compressor.run.export_dense", "export_dense"),
    "compressed-tensors": ("compressor.run.export_compressed_tensors", "export_compressed_tensors"),
    "gguf": ("compressor.run.export_gguf", "export_gguf"),
    "mlx": ("compressor.run.export_mlx", "export_mlx"),
    "gptq": ("compressor.run.export_gptq", "export_gptq"),
}
"""Form -> module and function ``(model, output, *, verify, **options) -> Exported``, imported when asked for.

Each refuses with a `UserError`, before it writes anything, what its form cannot say.
"""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        matrices: how many packed matrices were written again.
        tensor_bytes: of all tensors that were written.
        form: its name in full, such as ``gguf Q4_0``.
        exact: every matrix has the same values as in the folder it was made from.
        notes: what was rounded, left out or renamed, in words.
        runtimes: what has loaded or read it, and was held against the folder it was made from.
    """

    matrices: int
    tensor_bytes: int
    form: str = ""
    exact: bool = True
    notes: tuple[str, ...] = ()
    runtimes: tuple[Runtime, ...] = ()


def exporter(form: str) -> Callable[..., Exported]:
    """Return the function that writes a form: ``(model: str, output: Path, *, verify=True, **options) -> Exported``.

    Args:
        form: dense, compressed-tensors, gguf, mlx or gptq; gguf has an option ``kind``, as ``--type`` has.

    Raises:
        UserError: there is no such form.
    """
    if form not in FORMS:
        raise UserError(f"unknown format {form!r}{nearest(form, FORMS)}", fix="see --format")
    module, function = FORMS[form]
    found: Callable[..., Exported] = getattr(import_module(module), function)
    return found


def check_place(output: Path, source: Path) -> None:
    """Refuse a folder that holds something, or that an export of ``source`` cannot be written to.

    Raises:
        UserError: it is not absent or empty, it is the source, or it cannot be made.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already", fix="choose another folder to write")
    check_output(output, source, overwrite=False, flag="DEST")


def model_name(model: str) -> str:
    """The name of a model, a folder or a hub id, without where it lies."""
    return _named(model).name


def default_output(model: str, form: str) -> Path:
    """Where an export goes that was given no place: beside the model (or here, for a hub id), as ``MODEL-<form>``."""
    path = _named(model)
    return (path.parent if path.exists() else Path()) / f"{path.name}-{form}"


def _named(model: str) -> Path:
    """The path by its last name as it was given, a link's own; of ``.`` and the like, that of the folder."""
    path = Path(model).expanduser()
    return path if path.name not in ("", "..") else path.resolve()
