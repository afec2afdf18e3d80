from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def on_threads() -> Iterator[Callable[..., list[Any]]]:
    """Return a function that calls another on one thread and on two, and gives both results."""
    before = torch.get_num_threads()

    def run(function: Callable[..., Any], *args: Any) -> list[Any]:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(function(*args))
        return results

    yield run
    torch.set_num_threads(before)
