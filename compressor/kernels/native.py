"""The compiled kernels: where they come from, and what this processor can run of them.

``pip install`` compiles them where there is a compiler; ``compressor kernels build`` does so later. The environment
variable COMPRESSOR_KERNELS chooses what is used: ``auto``, an instruction set (``avx512``, ``avx2``, ``portable``), or
one of the ways without kernels of our own (``torch``, ``dense``, ``packed``).
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

from compressor.errors import UserError

VARIABLE = "COMPRESSOR_KERNELS"
LEVELS = ("portable", "avx2", "avx512")
"""Instruction sets, by the numbers that the kernels know them by."""

RUNGS = (*reversed(LEVELS), "torch", "dense", "packed")
"""Ways to multiply with a packed matrix, fastest first."""

ABI3 = ".abi3.so" if os.name == "posix" else ".pyd"


@dataclass(frozen=True)
class Native:
    """Compiled kernels.

    Attributes:
        module: the extension.
        file: where it was found.
        best: the highest of :data:`LEVELS` that this processor runs, as a number.
        bf16: whether the processor multiplies bf16.
    """

    module: Any
    file: Path
    best: int
    bf16: bool


def built_folder() -> Path:
    """Where ``compressor kernels build`` puts what it compiles: below XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "compressor" / "kernels"


def candidates() -> list[Path]:
    """Files that may be the extension, in the order in which they are tried: installed, then built later."""
    here = Path(__file__).parent
    from compressor.kernels.build import source_digest

    return [*(here / f"_native{suffix}" for suffix in (ABI3, *EXTENSION_SUFFIXES)),
            built_folder() / f"{source_digest()}{ABI3}"]  # fmt: skip


def _imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("compressor.kernels._native", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def native() -> Native | None:
    """The compiled kernels; None where there are none that this interpreter can load."""
    for file in candidates():
        if file.exists():
            try:
                module = _imported(file)
            except ImportError:  # built for another system
                continue
            best, bf16 = module.processor()
            return Native(module, file, best, bf16)
    return None


def wanted() -> str:
    """What COMPRESSOR_KERNELS says; ``auto`` if nothing.

    Raises:
        UserError: something that there is not, or that this machine cannot run.
    """
    value = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    if value not in ("auto", *RUNGS):
        raise UserError(f"{VARIABLE}={value}: expected auto, {', '.join(RUNGS)}", fix=f"unset {VARIABLE}")
    if value in LEVELS:
        found = native()
        if found is None:
            raise UserError(
                f"{VARIABLE}={value}, but the kernels are not compiled", fix="run `compressor kernels build`"
            )
        if LEVELS.index(value) > found.best:
            raise UserError(f"{VARIABLE}={value}, but this processor has no {value}", fix=f"unset {VARIABLE}")
    return value


def rung() -> str:
    """The way in which packed matrices are multiplied on CPUs here and now, one of :data:`RUNGS`.

    Without kernels, or on a processor for which they have plain C++ only, the stock operations of PyTorch.

    Raises:
        UserError: see `wanted`.
    """
    value = wanted()
    if value != "auto":
        return value
    found = native()
    return LEVELS[found.best] if found is not None and found.best else "torch"
