"""How much memory this process may use, and has used."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import psutil
import torch


def available_memory() -> int:
    """Bytes this process may still take: the least of free memory, its cgroup's and its address-space limit."""
    limits = [int(psutil.virtual_memory().available)]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    with contextlib.suppress(ImportError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft - psutil.Process().memory_info().vms)
    return max(0, min(limits))


def return_memory() -> None:
    """Give freed memory back to the system, where the C library would keep it: glibc holds on to freed pieces of up to
    32 MB, and with the matrices of block after block its heap would grow with their number."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    try:
        import resource
    except ImportError:
        return int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory(device: torch.device) -> int | None:
    """Largest allocation on an accelerator so far, in bytes; ``None`` on the CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None
