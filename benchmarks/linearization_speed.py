"""Time and memory of a token by context, softmax attention against linearized attention of the same shapes."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from compressor.hf.caches import read_on
from compressor.hf.linear_attention import LinearAttention
from compressor.hf.linear_cache import state_bytes
from compressor.methods.linearize_settings import LINEARIZE_METHODS

STEPS = 25
LONGEST_SOFTMAX_PREFILL = 16384  # tokens; beyond it the cache is made up
PIECE = 4096  # tokens of a prefill at once


def untrained(dense: Any) -> Any:
    """The same model with the default's attention in every layer, not trained: it takes as long."""
    model = copy.deepcopy(dense)
    spec = LINEARIZE_METHODS["windowed"]().mixer("windowed", dense.config.head_dim)
    for layer, block in enumerate(model.model.layers):
        block.self_attn = LinearAttention(block.self_attn, spec, layer)
    return model.eval()


@torch.no_grad()
def prefill(model: Any, tokens: int) -> tuple[Any, float]:
    """A cache of so many random tokens, read in pieces, and the seconds that took."""
    from transformers import DynamicCache

    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    began = time.perf_counter()
    for piece in ids.split(PIECE, 1):
        read_on(model.model, cache, input_ids=piece)
    return cache, time.perf_counter() - began


@torch.no_grad()
def made_up(model: Any, tokens: int) -> Any:
    """A softmax cache of so many tokens, filled with random numbers: what stands in it does not change the time."""
    from transformers import DynamicCache

    config, cache = model.config, DynamicCache(config=model.config)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


@torch.no_grad()
def token_ms(model: Any, cache: Any, token: int) -> float:
    """Milliseconds of one more token."""
    began = time.perf_counter()
    read_on(model.model, cache, input_ids=torch.tensor([[token]]))
    return 1e3 * (time.perf_counter() - began)


def measure_speed(dense: Any, contexts: Sequence[int]) -> dict[str, Any]:
    """Rows by context: seconds of a prefill, median milliseconds of a token, bytes of the cache, of both models.

    All caches are made first and the tokens then timed in turns, so that a machine that is slow for a while is slow
    for every context.
    """
    models = {"softmax": dense, "linear": untrained(dense)}
    rows: list[dict[str, Any]] = [{"context": context} for context in contexts]
    caches = []
    for row in rows:
        for name, model in models.items():
            if name == "softmax" and row["context"] > LONGEST_SOFTMAX_PREFILL:
                cache, seconds = made_up(model, row["context"]), None
            else:
                cache, seconds = prefill(model, row["context"])
            row |= {f"{name}_bytes": state_bytes(cache), f"{name}_prefill": seconds}
            caches.append((row, name, cache))
        print(row, flush=True)
    times: dict[tuple[int, str], list[float]] = {}
    for step in range(STEPS + 1):
        for row, name, cache in caches:
            times.setdefault((row["context"], name), []).append(token_ms(models[name], cache, step))
    for row in rows:
        row |= {f"{name}_ms": median(times[row["context"], name][1:]) for name in models}
    return {"rows": rows}
