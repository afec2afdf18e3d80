"""A 64-bit ARM processor, emulated: its kernels, called as if they were here.

``scripts/emulated.sh`` puts a Python for it into .venv/arm64; QEMU runs that, and in it the extension that an ARM
machine would compile. `Module` stands for the extension: what arguments point to is copied there and back.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor.kernels.build import compile_kernels
from compressor.kernels.matrix import Kind
from compressor.kernels.sources import source_digest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SYSROOT = ROOT / ".venv" / "arm64"
QEMU, COMPILER = "qemu-aarch64", "aarch64-linux-gnu-g++"
PROMISED = "COMPRESSOR_TEST_EMULATED"
"""Environment variable: set where everything is installed, so that what is absent is a failure and no skip."""

WITH_DOT_PRODUCTS, WITHOUT = "max", "cortex-a53"
"""Names of processors."""


def need_emulator() -> None:
    """Skip this test where there is no emulator, or fail it where one was promised."""
    interpreter = SYSROOT / "usr" / "bin" / "python3"
    absent = [name for name in (QEMU, COMPILER) if shutil.which(name) is None]
    absent += [] if interpreter.exists() else [f"Python in {SYSROOT}"]
    if sys.platform != "linux" or absent:
        what = f"{', '.join(absent) or 'Linux'}: not there; `sh scripts/emulated.sh` installs it"
        if os.environ.get(PROMISED):
            pytest.fail(what)
        pytest.skip(what)


def kernels_for_arm() -> Path:
    """The extension, compiled once for these sources as `compressor kernels build` compiles it."""
    file = ROOT / "build" / "tests" / f"{source_digest()}.arm64.abi3.so"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in several processes: the others wait for the first
        if not file.exists():
            (header,) = (SYSROOT / "usr" / "include").glob("python3*/Python.h")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CXX", f"{COMPILER} -I{header.parent} -I{header.parent.parent}")
                compile_kernels(file)
    return file


def python(cpu: str, *words: str) -> list[str]:
    """The command that runs Python on a processor."""
    return [QEMU, "-L", str(SYSROOT), "-cpu", cpu, str(SYSROOT / "usr" / "bin" / "python3"), "-S", *words]


def environment(**changed: str) -> dict[str, str]:
    """What such a Python is told."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COMPRESSOR_", "LD_", "PYTHON"))}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **changed}


class Module:
    """The extension in an emulated process.

    Attributes:
        levels, bf16: as in `Native`.
    """

    def __init__(self, cpu: str) -> None:
        command = python(cpu, str(HERE / "driver.py"), str(kernels_for_arm()))
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())
        self.levels, self.bf16 = self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait() == 0

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        try:
            return pickle.load(self.process.stdout)
        except EOFError:
            raise AssertionError(f"the emulated process ended: {self.process.wait()}") from None

    def _call(
        self, entry: str, arguments: tuple[Any, ...], sizes: dict[int, int], written: tuple[int, ...] = ()
    ) -> Any:
        """Call an entry; ``sizes``: bytes that the addresses among the arguments point to. Zero stays zero."""
        assert self.process.stdin is not None
        blocks = {
            place: (arguments[place] % 64, ctypes.string_at(arguments[place], size))
            for place, size in sizes.items() if arguments[place]
        }  # fmt: skip
        plain = [int(word) if isinstance(word, int) else word for word in arguments]  # no classes of ours
        pickle.dump((entry, plain, blocks), self.process.stdin)
        self.process.stdin.flush()
        result, wrong, found = self._answer()
        if wrong is not None:
            raise ValueError(wrong)
        for place, content in found.items():
            if place in written:
                ctypes.memmove(arguments[place], content, len(content))
            else:
                assert content == blocks[place][1], "an input was written to"
        return result

    def attention(self, *a: Any) -> None:
        """q, k, v, the mask, and the output of (batch, heads, dv)."""
        size = width(a[9])
        sizes = {0: size * a[1], 2: size * a[3], 4: size * a[5], 6: a[7], 8: size * a[10] * a[11] * a[15]}
        self._call("attention", a, sizes, written=(8,))

    def norm(self, *a: Any) -> None:
        """x, the weight, and the output of (rows, n)."""
        row = a[4] * width(a[5])
        self._call("norm", a, {0: a[3] * row, 1: row, 2: a[3] * row}, written=(2,))

    def linear(self, *a: Any) -> None:
        (_, m, n), (dtype, tokens) = a[:3], a[10:12]
        sizes = {9: tokens * n * width(dtype), 12: tokens * m * width(dtype), 13: 4 * m}
        self._call("linear", a, matrix_sizes(a) | sizes, (12,))

    def unpack(self, *a: Any) -> None:
        self._call("unpack", a, matrix_sizes(a) | {9: a[1] * a[2] * width(a[10])}, (9,))

    def pack_records(self, *a: Any) -> None:
        kind, m, n, kb = a[:4]
        tails = -(-m // 16) * -(-n // kb) * (128 if kind == Kind.TRIT3 else 64)
        self._call("pack_records", a, {4: planes(kind) * m * n, 5: tails, 6: a[7]}, (6,))

    def read_records(self, *a: Any) -> None:
        self._call("read_records", a, matrix_sizes(a) | {9: planes(a[0]) * a[1] * a[2]}, (9,))

    def pack_rows(self, *a: Any) -> None:
        kind, m, n = a[:3]
        tiles, wide = -(-m // 16), 2 if kind in (Kind.SPARSE_BF16, Kind.SPARSE_FP16) else 1
        entries = {4: m * n, 5: wide * m * n, 6: m * n, 7: tiles * -(-n // 128) * 64, 8: tiles * 128}
        self._call("pack_rows", a, entries | {9: 8 * (tiles + 1), 10: a[11]}, (9, 10))

    def read_memory(self, *a: Any) -> int:
        found: int = self._call("read_memory", a, {0: a[1]})
        return found

    def use_large_pages(self, *a: Any) -> None:
        """Advice about memory that is not there."""


def width(dtype: int) -> int:
    return 2 if dtype else 4


def planes(kind: int) -> int:
    return {Kind.TRIT2: 2, Kind.TRIT3: 3, Kind.INT3: 2}.get(Kind(kind), 1)


def matrix_sizes(arguments: tuple[Any, ...]) -> dict[int, int]:
    """Of a matrix at the beginning of the arguments."""
    return {5: arguments[6], 7: arguments[8]}
