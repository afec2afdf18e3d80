"""What pyproject.toml cannot say: the kernels, which may fail to compile; texts and recipes inside the wheel."""

import os
import runpy
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SOURCES = runpy.run_path(str(ROOT / "compressor" / "kernels" / "sources.py"))  # without importing the package

# GCC's vector types, and one file for all versions of CPython: not with MSVC, PyPy or without the GIL
SUPPORTED = (
    os.name == "posix" and sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT.resolve() if path.is_absolute() else ROOT)).replace(os.sep, "/")


class BuildWithData(build_py):
    """calibration/ and recipes/ stand at the top of the repository, and travel inside the wheel."""

    def run(self) -> None:
        if not self.editable_mode:  # nothing that an earlier build left behind
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for name in ("calibration", "recipes"):
                target = Path(self.build_lib) / "compressor" / "data" / name
                shutil.copytree(ROOT / name, target, dirs_exist_ok=True)


kernels = Extension(
    "compressor.kernels._native",
    sources=[relative(SOURCES["SOURCE"])],
    depends=[relative(file) for file in SOURCES["native_files"]()],
    extra_compile_args=[*SOURCES["OPTIONS"], SOURCES["digest_option"]()],
    extra_link_args=["-pthread"],
    language="c++",
    py_limited_api=True,
    optional=True,
)

setup(
    ext_modules=[kernels] if SUPPORTED else [],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if SUPPORTED else {},
    cmdclass={"build_py": BuildWithData},
)
