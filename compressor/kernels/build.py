"""Compiling the kernels: by ``pip install`` and by ``compressor kernels build``, with the same options."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from compressor.errors import UserError

SOURCE = Path(__file__).parent / "native" / "module.cpp"
OPTIONS = ("-std=c++17", "-O3", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wno-psabi")
"""Never -march=native: instruction sets are chosen at run time."""


def source_digest() -> str:
    """Sixteen hexadecimal digits that change with the source and the options."""
    digest = hashlib.sha256(" ".join(OPTIONS).encode())
    for file in sorted(SOURCE.parent.iterdir()):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def compile_kernels(target: Path, extra: tuple[str, ...] = ()) -> list[str]:
    """Compile the extension into ``target``; return the command that did it.

    Args:
        extra: further options of the compiler.

    Raises:
        UserError: there is no compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        raise UserError("no C++ compiler: expected g++ or clang++ on the path", fix="set CXX")
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        raise UserError(f"Python.h is not in {include}", fix="install Python's headers (python3-dev)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        shared = ["-shared", "-fPIC", "-pthread"]
        if os.uname().sysname == "Darwin":
            shared = ["-bundle", "-undefined", "dynamic_lookup"]
        command = [*compiler.split(), *OPTIONS, *extra, *shared, f"-I{include}", str(SOURCE), "-o", str(made)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            raise UserError(f"{command[0]} failed:\n{found.stderr.strip()[-2000:]}", fix="set CXX to another compiler")
        made.replace(target)
    return command
