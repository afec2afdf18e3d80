"""Token after token on CPUs, around the packed layers: attention by the kernels, and a cache that is not copied.

transformers finds attention in a table, by name. The entry "sdpa", which a model has unless another is asked for, is
wrapped once: for modules that are marked, and a single token, it asks the kernels; everything else goes on to what
stood there before. Another name would be seen in configs, where transformers and models look for "sdpa".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compressor.hf.caches import NAMES
from compressor.hf.norms import quicken_norms
from compressor.kernels.attention import attention, can_attend
from compressor.kernels.native import LEVELS

MARK = "compressor_attention"
"""Attribute of modules whose attention the kernels compute: an instruction set."""

MORE, LEAST = 4, 128
"""A cache that is full gets room for a fourth more tokens, and for so many at least."""


def quicken(model: nn.Module, rung: str) -> None:
    """Let a model on the CPU decode by the kernels, if the rung is theirs: attention, norms, and a cache that grows.

    Args:
        model: of transformers, or what has parts of it; others stay as they are.
        rung: one of `compressor.kernels.native.RUNGS`; ``packed`` leaves, or makes, everything transformers' own.
    """
    if rung in LEVELS:
        _wrap()
    for module in model.modules():
        if rung in LEVELS and hasattr(module, "layer_idx"):  # what attends has a place in the cache
            setattr(module, MARK, rung)
        elif MARK in vars(module):
            delattr(module, MARK)
    quicken_norms(model, rung if rung in LEVELS else None)
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _grow:
            model._forward_pre_hooks.pop(key)
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    if rung != "packed":
        model.register_forward_pre_hook(_grow, with_kwargs=True)


def _wrap() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(before, "wrapped_by", None) == __name__:
        return

    def sdpa(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        dropout: float = 0.0, scaling: float | None = None, **more: Any,
    ) -> Any:  # fmt: skip
        """Attention of transformers' table, see its ``sdpa_attention_forward``."""
        level = getattr(module, MARK, None)
        plain = not dropout and all(more.get(name) is None for name in ("position_bias", "cache", "softcap"))
        if level is not None and plain and can_attend(query, key, value, attention_mask):
            scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            return attention(query, key, value, attention_mask, scale, level), None
        return before(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)

    sdpa.wrapped_by = __name__  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa)


def _grow(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Before a model reads tokens: let the layers of its cache be ones that grow in place."""
    cache: Any = next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)
    if type(cache) is not DynamicCache or torch.compiler.is_compiling() or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[place] = GrowingLayer()
            cache.layers[place].__dict__.update(layer.__dict__)


class _Room:
    """Memory for keys or values, (batch, heads, tokens, width), with tokens to spare, and the part that is in use."""

    def __init__(self, held: Tensor, more: Tensor) -> None:
        tokens = more.shape[-2] + (held.shape[-2] if held.numel() else 0)
        spare = max(LEAST, tokens // MORE)
        self.memory = more.new_empty(*more.shape[:-2], tokens + spare, more.shape[-1])
        self.used = self.memory[..., : tokens - more.shape[-2], :]
        if held.numel():
            self.used.copy_(held)

    def takes(self, held: Tensor, more: Tensor) -> bool:
        """Whether ``more`` can follow: ``held`` is what is in use here, not cropped, reordered or somebody else's."""
        fits = held is self.used and held.shape[-2] + more.shape[-2] <= self.memory.shape[-2]
        alike = more.shape[:-2] == held.shape[:-2] and more.dtype == held.dtype
        return fits and alike and (torch.is_inference_mode_enabled() or not self.memory.is_inference())

    def add(self, more: Tensor) -> Tensor:
        """Put tokens behind those in use; return all of them."""
        first, count = self.used.shape[-2], more.shape[-2]
        self.memory.narrow(-2, first, count).copy_(more)
        self.used = self.memory.narrow(-2, 0, first + count)
        return self.used


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """transformers' `DynamicLayer`, which copies all keys and values for every token, without that.

    Tokens are added to memory that has room for more. The tensors that it gives are views of it and never change: where
    a token would have to be written over another one (after ``crop``), or beside a stranger's, memory is new.
    """

    keys: Any  # tensors, or None before there are any
    values: Any
    _rooms: tuple[_Room, _Room] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; return the keys and values of all.

        Args:
            key_states, value_states: (batch, heads, tokens, width).
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or key_states.device.type != "cpu":
            given: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return given
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rooms = self._rooms
        if rooms is None or not (rooms[0].takes(self.keys, key_states) and rooms[1].takes(self.values, value_states)):
            rooms = self._rooms = _Room(self.keys, key_states), _Room(self.values, value_states)
        self.keys, self.values = rooms[0].add(key_states), rooms[1].add(value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all tokens."""
        if self._rooms is not None:  # older versions write zeros: not over what was given out
            self.keys, self.values, self._rooms = self.keys.clone(), self.values.clone(), None
        super().reset()
