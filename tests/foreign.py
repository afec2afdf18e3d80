"""Programs that are not ours: tests that need one are skipped without it, but fail where they were promised (CI)."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

PROMISED = "COMPRESSOR_TEST_RUNTIMES"
"""Environment variable: set where all runtimes are installed, so that an absent one is a failure and no skip."""


def absent(what: str) -> None:
    """Skip this test for want of ``what``, or fail it where everything was promised."""
    if os.environ.get(PROMISED):
        pytest.fail(f"{what} is not there, but {PROMISED} is set")
    pytest.skip(f"{what} is not installed")


def need_package(name: str) -> None:
    """The Python package ``name`` must be importable for this test."""
    if find_spec(name) is None:
        absent(name)
