"""Runs the tests of the GPU kernels in a process of their own, where Triton interprets them on the CPU.

Triton decides when it is first imported whether it compiles or interprets, and transformers imports it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from triton_matrices import DEVICE, HAS_TRITON, INTERPRETED

HERE = Path(__file__).parent


@pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed (pip install triton)")
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests have run in this process already")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_triton.py", "test_triton_ops.py"])
def test_in_the_interpreter(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", str(HERE / name)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 10, done.stdout[-2000:]
