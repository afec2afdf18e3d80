"""The compiled kernels: where they come from, and what this processor can run of them.

``pip install`` compiles them where there is a compiler; ``compressor kernels build`` does so later. The environment
variable COMPRESSOR_KERNELS chooses what is used: ``auto``, an instruction set (``avx512``, ``avx2``, ``neon``,
``portable``), or one of the ways without kernels of our own (``torch``, ``dense``, ``packed``).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from compressor.errors import UserError
from compressor.kernels.sources import source_digest

VARIABLE = "COMPRESSOR_KERNELS"
LEVELS = ("portable", "avx2", "avx512", "neon")
"""Instruction sets, by the numbers that the kernels know them by."""

RUNGS = ("avx512", "avx2", "neon", "portable", "torch", "dense", "packed")
"""Ways to multiply with a packed matrix, fastest first."""

_asked: ContextVar[str | None] = ContextVar("asked", default=None)

ABI3 = ".abi3.so" if os.name == "posix" else ".pyd"


@dataclass(frozen=True)
class Native:
    """Compiled kernels.

    Attributes:
        module: the extension.
        file: where it was found.
        levels: those of :data:`LEVELS` that this processor runs, the best one last.
        bf16: whether the processor multiplies bf16.
    """

    module: Any
    file: Path
    levels: tuple[str, ...]
    bf16: bool

    @property
    def best(self) -> int:
        """The best of `levels`, by its number; 0 where there is plain C++ only."""
        return LEVELS.index(self.levels[-1])


def built_folder() -> Path:
    """Where ``compressor kernels build`` puts what it compiles: below XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "compressor" / "kernels"


def built_file() -> Path:
    """What ``compressor kernels build`` makes of the sources of this version."""
    return built_folder() / f"{source_digest()}{ABI3}"


def candidates() -> list[Path]:
    """Files that may be the extension, in the order in which they are tried: installed, then built later."""
    here = Path(__file__).parent
    return [*(here / f"_native{suffix}" for suffix in dict.fromkeys((ABI3, *EXTENSION_SUFFIXES))), built_file()]


def load(file: Path) -> Native:
    """Load one file.

    Raises:
        ImportError: it is no extension for this interpreter and system, or made from other sources than ours.
    """
    spec = importlib.util.spec_from_file_location("compressor.kernels._native", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made_from = getattr(module, "sources", "unknown")  # unknown: compiled by hand
    if made_from not in ("unknown", source_digest()):
        raise ImportError("made from other sources than those beside it")
    numbers, bf16 = module.processor()
    return Native(module, file, tuple(LEVELS[number] for number in numbers), bf16)


@cache
def search() -> tuple[Native | None, tuple[str, ...]]:
    """The compiled kernels, or None, and what is wrong with files that were tried before."""
    wrong: list[str] = []
    for file in candidates():
        if file.exists():
            try:
                return load(file), tuple(wrong)
            except ImportError as error:
                wrong.append(f"{file}: {error}".replace(f": {file}:", ":"))
    return None, tuple(wrong)


@cache  # too: it is asked at every product
def native() -> Native | None:
    """The compiled kernels; None where there are none that this interpreter can load."""
    return search()[0]


def forget() -> None:
    """Search anew when somebody asks next: files have changed."""
    search.cache_clear()
    native.cache_clear()


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
        if value not in found.levels:
            raise UserError(f"{VARIABLE}={value}, but this processor has no {value}", fix=f"unset {VARIABLE}")
    return value


@contextmanager
def using(way: str) -> Iterator[None]:
    """Within, models are loaded to multiply with packed matrices in this way, whatever COMPRESSOR_KERNELS says.

    What compares numbers asks for ``packed``: the matrices as they are stored, activations as they come.

    Args:
        way: one of `RUNGS` that this machine has.
    """
    before = _asked.set(way)
    try:
        yield
    finally:
        _asked.reset(before)


def rung() -> str:
    """The way in which packed matrices are multiplied on CPUs here and now, one of :data:`RUNGS`.

    Without kernels, or on a processor for which they have plain C++ only, the stock operations of PyTorch.

    Raises:
        UserError: see `wanted`.
    """
    return rung_and_why()[0]


def rung_and_why() -> tuple[str, str]:
    """`rung`, and the reason in words."""
    if (asked := _asked.get()) is not None:
        return asked, "asked for by the program"
    value, found = wanted(), native()
    if value != "auto":
        return value, f"forced by {VARIABLE}"
    if found is None:
        return "torch", "the kernels are not compiled; run `compressor kernels build`"
    if not found.best:
        return "torch", "the kernels are plain C++ on this processor: it has neither AVX2 nor NEON with dot products"
    return LEVELS[found.best], "the best that this processor has"
