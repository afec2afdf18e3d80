"""llama.cpp's matrix product, in a process of its own: benchmarks/ggml says how to build it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


class Ggml:
    """A running ``ggml_job``.

    Attributes:
        version, features: what it says of itself; instruction sets among the features.
    """

    def __init__(self, folder: Path) -> None:
        """Start the program in ``folder``; OSError if it is not there."""
        self._process = subprocess.Popen(
            [str(folder / "ggml_job")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        said = self._answer()
        self.version: str = said["version"]
        self.features: list[str] = said["features"]

    def make(self, kind: str, layout: str, m: int, n: int, tokens: int, threads: int, memory: int) -> dict[str, Any]:
        """Prepare products of a random m x n matrix in as many copies as ``memory`` bytes hold.

        Returns:
            Number of the job, bytes of the matrix, name of its buffer, and the error of the first result relative to
            the largest.
        """
        return self._ask(f"make {kind} {layout} {m} {n} {tokens} {threads} {memory}")

    def run(self, job: int, calls: int) -> dict[str, list[float]]:
        """Seconds of so many products, each with the next copy: ``cpu`` of the thread, and ``wall``."""
        return self._ask(f"run {job} {calls}")

    def drop(self, job: int) -> None:
        """Free a job's memory."""
        self._ask(f"drop {job}")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"ggml_job ended with exit code {self._process.wait()}")
        return dict(json.loads(line))
