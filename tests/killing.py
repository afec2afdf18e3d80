"""Runs that are killed in this process, at a call of our choice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """What stands for kill -9: nothing catches it."""


def killer(patch: pytest.MonkeyPatch, fatal: int) -> list[str]:
    """Die at file operation number ``fatal``, before it is done; returns the growing list of operations."""
    done: list[str] = []

    def watched(owner: Any, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            if len(done) == fatal:
                raise Killed
            done.append(f"{name} {args[0]}")
            return plain(*args, **kwargs)

        patch.setattr(owner, name, operation)

    for name in ("replace", "rename", "unlink", "mkdir"):
        watched(Path, name)
    watched(shutil, "rmtree")
    watched(shutil, "copyfile")
    return done


def dying(calls: dict[str, int], what: str, plain: Callable[..., Any], fatal: int) -> Callable[..., Any]:
    """``plain``, which dies when it is called for the ``fatal``-th time; counts its calls under ``what``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[what] += 1
        if calls[what] == fatal:
            raise Killed
        return plain(*args, **kwargs)

    return call
