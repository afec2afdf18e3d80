"""Importing torch and transformers without Python's cyclic garbage collector.

Their imports make about a million objects that stay. The collector looks through them time and again while they are
made, and once more when the interpreter ends: together a third of the processor time of the imports.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected(*, for_good: bool = False) -> Iterator[None]:
    """Let what is inside, or the function that this decorates, run without collections.

    Args:
        for_good: whatever is there at the end is never looked at again; not in a process that belongs to a host.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if for_good:
            gc.freeze()
        if before:
            gc.enable()


def end_quickly() -> None:
    """Let this process end without a last collection: the system takes all memory back. Not for a host that calls us.

    Exit handlers still run, and what is closed by them or by `with` is closed.
    """
    atexit.unregister(_end)
    atexit.register(_end)


def _end() -> None:
    # triton's binding lists on standard error, at length, every object of its own that outlives the interpreter
    if "triton._C.libtriton" in sys.modules:
        gc.unfreeze()
    else:
        gc.freeze()
