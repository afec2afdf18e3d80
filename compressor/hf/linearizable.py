"""Whether the attention layers of a loaded model are what a linearized layer takes them for."""

from __future__ import annotations

from typing import Any

import torch

from compressor.hf.linear_attention import LinearAttention
from compressor.hf.linearized import PADDING, attention_of, obstacle
from compressor.mixers.spec import WINDOW, MixerSpec

TOKENS = 12
"""Of the text that is tried: enough for every rotation to show, and within any window."""

CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative difference that rounding may make; 5 percent in half precision."""


def obstacles(model: Any, spec: MixerSpec) -> dict[int, str]:
    """Return layer -> why it cannot be linearized, for the layers of ``model`` that cannot.

    What a layer's looks do not betray (rotations of other pairs, scores that are capped, scaled or not rotated at all)
    shows when it runs: softmax over a window as long as the text, computed by :class:`LinearAttention`, must give what
    the layer gives. One short forward pass of the whole model.

    Args:
        model: a causal language model in memory, its weights loaded.
        spec: what is to take the place of attention.
    """
    found: dict[int, str] = {}
    tried: dict[int, tuple[Any, dict[str, Any]]] = {}
    heard: set[int] = set()
    hooks = []
    for layer, block in enumerate(model.base_model.layers):
        try:
            _, attention = attention_of(block)
        except ValueError as error:
            found[layer] = str(error)
            continue
        if why := obstacle(attention, spec):
            found[layer] = why
        else:
            hooks.append(attention.register_forward_hook(_keep(tried, layer), with_kwargs=True))
            hooks.append(block.register_forward_pre_hook(_listen(heard, layer), with_kwargs=True))
    ids = torch.arange(3, 3 + TOKENS, device=model.device)[None] % model.config.vocab_size
    try:
        with torch.no_grad():
            model(ids, use_cache=False, **{PADDING: torch.ones_like(ids)})
            for layer, (attention, call) in tried.items():
                if layer not in heard:
                    found[layer] = "its model does not say which tokens are padding"
                elif (apart := _apart(attention, layer, call)) > CLOSE.get(model.dtype, 0.05):
                    found[layer] = f"it does not compute what was expected (it is {apart:.1%} away)"
    finally:
        for hook in hooks:
            hook.remove()
    return dict(sorted(found.items()))


def _keep(tried: dict[int, tuple[Any, dict[str, Any]]], layer: int) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        positions = kwargs.get("position_embeddings")
        tried[layer] = (module, {"hidden": hidden, "positions": positions, "output": output[0]})

    return hook


def _listen(heard: set[int], layer: int) -> Any:
    def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if PADDING in kwargs:
            heard.add(layer)

    return hook


def _apart(attention: Any, layer: int, call: dict[str, Any]) -> float:
    """Relative difference between the outputs of a softmax attention and of a linearized one that sees as much."""
    same = LinearAttention(attention, MixerSpec("window-sink", TOKENS, 0, WINDOW), layer)
    output, _ = same(call["hidden"], call["positions"])
    wanted = call["output"].float()
    return float((output.float() - wanted).norm() / wanted.norm().clamp_min(1e-12))
