"""The same tests with kernels that watch themselves: addresses, undefined behaviour, races."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.errors import UserError
from compressor.kernels.build import compile_kernels, compiler
from compressor.kernels.native import ABI3

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ADDRESSES = ("test_native_products.py", "test_native_calls.py", "test_native_attention.py", "test_norms.py")
RACES = ("test_native_calls.py::test_the_same_bytes_for_any_number_of_threads",
         "test_native_calls.py::test_many_python_threads_at_once",
         "test_native_attention.py::test_the_same_bytes_for_any_number_of_threads")  # fmt: skip


def library(name: str) -> str:
    """The runtime of a sanitizer, where the compiler has one."""
    if sys.platform != "linux":
        pytest.skip("preloading a sanitizer is tried on Linux only")
    try:
        program = compiler()
    except UserError as error:
        pytest.skip(str(error))
    asked = [*program, f"-print-file-name={name}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{program[0]} has no {name}")
    return found


def compiled(folder: Path, *options: str) -> Path:
    file = folder / f"kernels{ABI3}"
    compile_kernels(file, ("-O1", "-g1", "-fno-omit-frame-pointer", *options))
    return file


def run_tests(file: Path, tests: tuple[str, ...], preload: str, **settings: str) -> None:
    """Run tests in a process of their own with these kernels."""
    environment = os.environ | {
        "COMPRESSOR_TEST_KERNELS": str(file), "LD_PRELOAD": preload, "PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), **settings,
    }  # fmt: skip
    environment.pop("COMPRESSOR_KERNELS", None)
    chosen = [str(HERE / test) for test in tests]
    plain = ["-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "-p", "no:xdist"]  # says "passed"
    command = [sys.executable, "-m", "pytest", "-x", "-s", *plain, *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "passed" in said, said[-4000:]
    assert not any(word in said for word in ("runtime error:", "ERROR: AddressSanitizer", "WARNING: ThreadSanitizer"))


@pytest.mark.slow
def test_addresses_and_undefined_behaviour(tmp_path: Path) -> None:
    preload = f"{library('libasan.so')} {library('libstdc++.so.6')}"  # the first looks for exceptions in the second
    file = compiled(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    run_tests(file, ADDRESSES, preload, ASAN_OPTIONS="detect_leaks=0:abort_on_error=0")


@pytest.mark.slow
def test_races(tmp_path: Path) -> None:
    preload = f"{library('libtsan.so')} {library('libstdc++.so.6')}"
    file = compiled(tmp_path, "-fsanitize=thread")
    run_tests(file, RACES, preload, TSAN_OPTIONS="report_bugs=1:exitcode=66:ignore_noninstrumented_modules=1")
