"""The place of a linearized layer in a transformers cache: tensors of constant size instead of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class LinearState(CacheLayerMixin):  # type: ignore[misc]
    """What one linearized layer remembers of the tokens so far.

    Attributes:
        tensors: by name, each with the batch as first dimension; empty before the first token.
        seen: tokens so far, padding included.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.seen = 0

    def advance(self, tensors: dict[str, Tensor], tokens: int) -> None:
        """Take the state behind ``tokens`` more tokens."""
        self.tensors = tensors
        self.seen += tokens
        self.is_initialized = True

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors.values())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first call of the layer brings the tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refused: a linearized layer has no keys and values to give out."""
        raise NotImplementedError("a linearized attention layer keeps a state, not keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a softmax layer beside this one sees."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.tensors, self.seen, self.is_initialized = {}, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused but for nothing: what a memory has taken in cannot be taken out."""
        if tokens_to_remove:
            raise ValueError(
                "the memory of a linearized attention layer cannot be cropped; assisted decoding needs that"
            )

    def _map(self, change: Any) -> None:
        self.tensors = {name: change(tensor) for name, tensor in self.tensors.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let every row continue another one (beam search)."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._map(lambda tensor: tensor[indices])

    def offload(self) -> None:
        """Move to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Nothing to do: the layer moves the state to where its tokens are."""


def linear_state(cache: Cache, layer: int) -> LinearState:
    """Return the state of a layer in ``cache``, and put it there at the layer's first call.

    The model's configuration speaks of ordinary layers, and so does the cache that transformers has built from it.
    Where it is an empty one, it is replaced; so every kind of cache works, whoever has made it.

    Raises:
        ValueError: the cache holds keys and values for this layer already: another model has filled it; or it is a
            static one, whose masks count places rather than tokens.
    """
    while len(cache.layers) <= layer:
        replicate = getattr(cache, "layer_class_to_replicate", None)
        cache.layers.append(replicate() if replicate is not None else LinearState())
    found = cache.layers[layer]
    if isinstance(found, LinearState):
        return found
    if getattr(found, "is_compileable", False):
        raise ValueError("a linearized attention layer cannot use a static cache: leave cache_implementation out")
    length = found.get_seq_length()
    if int(length) > 0:
        raise ValueError(f"layer {layer} is linearized, but the cache already holds keys and values for it")
    cache.layers[layer] = state = LinearState()
    return state


def state_bytes(cache: Cache) -> int:
    """Bytes of a cache: keys, values and states of every layer."""
    total = 0
    for found in cache.layers:
        if isinstance(found, LinearState):
            total += found.nbytes
        else:
            held = (getattr(found, name, None) for name in ("keys", "values"))
            total += sum(tensor.numel() * tensor.itemsize for tensor in held if isinstance(tensor, torch.Tensor))
    return total
