"""What the kernels are compiled from, and how. ``setup.py`` runs this file: it imports nothing of ours."""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent / "native"
SOURCE = FOLDER / "module.cpp"

OPTIONS = ("-std=c++17", "-O3", "-g0", "-fno-strict-aliasing", "-fvisibility=hidden", "-pthread", "-Wno-psabi")
"""Never -march=native: instruction sets are chosen at run time."""


def native_files() -> list[Path]:
    """All files that are compiled, sorted."""
    return sorted(file for file in FOLDER.iterdir() if file.suffix in (".cpp", ".hpp"))


def source_digest() -> str:
    """Sixteen hexadecimal digits that change with the source and the options."""
    digest = hashlib.sha256(" ".join(OPTIONS).encode())
    for file in native_files():
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def digest_option() -> str:
    """The option by which a compiled extension knows what it was made from."""
    return f"-DCOMPRESSOR_SOURCES={source_digest()}"
