"""Running a command as a whole process, and what it took: wall seconds, processor seconds, peak memory.

Keep the caller small: on Linux a child's peak starts with what its parent had in memory when it was started, so the
scripts that measure import neither torch nor transformers themselves.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL = 0.2  # seconds between looks at the memory of all processes of a command


def compressor_command(*arguments: str) -> list[str]:
    """The command line of this installation of compressor."""
    start = "import sys; from compressor.cli.app import main; sys.exit(main())"
    return [sys.executable, "-c", start, *arguments]


@dataclass(frozen=True)
class Measured:
    """What a command took.

    Attributes:
        seconds, cpu_seconds: wall clock; processor time of the process and its children.
        peak_bytes: largest resident set of any one of its processes, as the kernel knows it.
        tree_bytes: largest memory of all its processes together, shared pages counted once (sampled), at least
            ``peak_bytes``.
    """

    code: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    tree_bytes: int
    output: str
    errors: str


def run_child(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    address_space: int | None = None,
    cwd: Path | None = None,
) -> Measured:
    """Run a command to its end. With ``address_space`` (bytes), no process of it may map more than that."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        since = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            preexec_fn=_limiter(address_space),
        )
        tree = _TreeWatch(process.pid)
        tree.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - since
        process.returncode = os.waitstatus_to_exitcode(status)
        tree.stop()
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Measured(
            code=process.returncode,
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_bytes=peak,
            tree_bytes=max(peak, tree.peak),
            output=_text(out),
            errors=_text(err),
        )


def _limiter(address_space: int | None) -> Callable[[], None] | None:
    if address_space is None:
        return None

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    return limit


def _text(file: object) -> str:
    file.seek(0)  # type: ignore[attr-defined]
    return str(file.read().decode(errors="replace"))  # type: ignore[attr-defined]


class _TreeWatch(threading.Thread):
    """Looks at the memory of a process and all below it, again and again."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.over = pid, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(INTERVAL):
            try:
                root = psutil.Process(self.pid)
                total = sum(_own_memory(each) for each in [root, *root.children(recursive=True)])
            except psutil.Error:
                continue
            self.peak = max(self.peak, total)

    def stop(self) -> None:
        self.over.set()
        self.join()


def _own_memory(process: psutil.Process) -> int:
    """Bytes of a process, its part of shared pages only; its whole resident set where the system does not tell."""
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    except OSError:
        try:
            return int(process.memory_info().rss)
        except psutil.Error:
            return 0
