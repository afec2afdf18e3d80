"""Compiling the kernels after the installation: ``compressor kernels build``."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from compressor.errors import UserError
from compressor.kernels.sources import OPTIONS, SOURCE, digest_option


def compiler() -> list[str]:
    """The C++ compiler and options that CXX gives it; without CXX the first of g++, clang++ and c++ on the path.

    Raises:
        UserError: there is none.
    """
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise UserError(f"CXX={' '.join(asked)}: there is no such program", fix="unset CXX")
        return asked
    found = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if found is None:
        raise UserError("no C++ compiler: expected g++ or clang++ on the path", fix="install one or set CXX")
    return [found]


def compile_kernels(target: Path, extra: tuple[str, ...] = ()) -> list[str]:
    """Compile the extension into ``target``; return the command that did it.

    Args:
        extra: further options of the compiler.

    Raises:
        UserError: there is no compiler, no header of Python, or the compiler fails.
    """
    if os.name != "posix":
        raise UserError("the kernels need GCC or Clang on Linux or macOS")
    program = compiler()
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        raise UserError(f"Python.h is not in {include}", fix="install Python's headers (python3-dev)")
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        options = [*OPTIONS, digest_option(), *extra, "-fPIC", *shared, f"-I{include}"]
        command = [*program, *options, str(SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise UserError(f"{program[0]} failed: {_complaint(done.stderr)}", fix="set CXX to another compiler")
        made.replace(target)
    return [*command[:-1], str(target)]


def _complaint(text: str) -> str:
    """The first errors among what a compiler said."""
    lines = text.strip().splitlines()
    return "\n".join([line for line in lines if "error" in line][:3] or lines[-3:]) or "it said nothing"
