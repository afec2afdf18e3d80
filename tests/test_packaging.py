"""What travels in a wheel: every file of the package that is no Python, the texts, the recipes."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from compressor.calibration.folders import data_folder
from compressor.kernels import sources

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "compressor"
BUILT = {".py", ".pyc", ".so", ".pyd"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is not in Python 3.10")
def test_every_file_of_the_package_is_package_data() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    globs = settings["tool"]["setuptools"]["package-data"]["compressor"]
    travel = {file for glob in globs for file in PACKAGE.glob(glob)}
    files = {file for file in PACKAGE.rglob("*") if file.is_file() and file.suffix not in BUILT}
    assert files == travel
    assert {sources.SOURCE, PACKAGE / "py.typed", PACKAGE / "embedded" / "model.safetensors"} <= travel


def test_every_folder_with_python_is_a_package() -> None:
    folders = {file.parent for file in PACKAGE.rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_setup_copies_what_is_looked_for() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    for kind in ("calibration", "recipes"):
        assert f'"{kind}"' in text and data_folder(kind) == ROOT / kind  # type: ignore[arg-type]


def test_sources_run_without_the_package() -> None:
    """As setup.py runs them, in an environment that has setuptools only."""
    alone = runpy.run_path(str(PACKAGE / "kernels" / "sources.py"))
    assert alone["source_digest"]() == sources.source_digest()
    assert re.fullmatch(r"-DCOMPRESSOR_SOURCES=[0-9a-f]{16}", alone["digest_option"]())
    assert not any(option.startswith("-march") for option in sources.OPTIONS)
