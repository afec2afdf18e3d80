"""Imports without the garbage collector."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from compressor.engine.imports import uncollected


def test_the_collector_is_off_inside_and_as_before_afterwards() -> None:
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()


def test_a_host_that_has_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_it_decorates_functions() -> None:
    inside = uncollected()(gc.isenabled)
    assert [inside(), inside(), gc.isenabled()] == [False, False, True]


def test_what_is_frozen_for_good_is_not_looked_at_again_and_exit_handlers_run() -> None:
    code = """
import atexit, gc, sys
from compressor.engine.imports import end_quickly, uncollected

class Loud:
    def __init__(self, name): self.me, self.name = self, name
    def __del__(self): print("collected", self.name)

end_quickly()
atexit.register(print, "exit handler")
before = gc.get_freeze_count()
with uncollected(for_good=True):
    Loud("frozen")
assert gc.get_freeze_count() > before
Loud("ordinary")
gc.collect()
Loud("at the end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["collected ordinary", "exit handler"]
