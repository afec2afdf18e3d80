"""What transformers calls the cache of a model: ``past_key_values`` up to 5.23, ``cache`` from 5.24 on."""

from __future__ import annotations

import functools
import inspect
from typing import Any

NAMES = ("cache", "past_key_values")


@functools.cache
def cache_name(model: Any) -> str:
    """Return the name of the argument by which models of a class take a cache, and of the field that returns it."""
    return NAMES[0] if NAMES[0] in inspect.signature(model.forward).parameters else NAMES[1]


def read_on(model: Any, cache: Any, **inputs: Any) -> tuple[Any, Any]:
    """Let a model read tokens after those that a cache holds (None: none).

    Args:
        inputs: ``input_ids`` and whatever else its ``forward`` takes.

    Returns:
        (what it returns, the cache with these tokens).
    """
    kind: Any = type(model)
    name = cache_name(kind)
    out = model(**{name: cache}, use_cache=True, **inputs)
    return out, getattr(out, name)
