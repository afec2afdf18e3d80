"""Fixtures of all folders. This file also puts ``tests/`` on the path, for ``tiny_models``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_models
import torch
from command_line import Command, make_command

os.environ.setdefault(
    "COMPRESSOR_KERNELS", "packed"
)  # numbers are compared bit for bit; tests/kernels choose their own


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate on."""
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text(tiny_models.text(1), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text, to evaluate on."""
    file = tmp_path_factory.mktemp("text") / "heldout.txt"
    file.write_text(tiny_models.text(2), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with GQA and tied embeddings, with tokenizer. Not to be written to."""
    return tiny_models.save(tiny_models.random_model("llama"), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bf16 Llama, whose values are rounded once more than in float32. Not to be written to."""
    model = tiny_models.random_model("llama", dtype=torch.bfloat16)
    return tiny_models.save(model, tmp_path_factory.mktemp("models") / "half")


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth of memory is measured on a few megabytes."""
    from compressor.run import bench_measure

    monkeypatch.setattr(bench_measure, "PASSED", 1 << 22)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``compressor`` with arguments in this process."""
    return make_command(monkeypatch, capsys)


@pytest.fixture
def by_the_package() -> None:
    """Folders are read by the package's classes: a reader file that another test has run may have taken their place."""
    from compressor.hf.fast import register

    register()
