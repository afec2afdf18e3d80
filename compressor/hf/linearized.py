"""Puts linearized attention into a model whose configuration asks for it, and gives its layers what they need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compressor.hf.linear_attention import LinearAttention
from compressor.mixers.spec import WHOLE, MixerSpec, read_spec

CONFIG_KEY = "linear_attention"
"""In config.json: ``layers``, the indices of the linearized ones, and ``mixer``, what they compute."""


def linear_layers(config: Any) -> dict[int, MixerSpec]:
    """Return layer -> what it computes, of a configuration (an object or a dict); empty for an ordinary model.

    Raises:
        ValueError: settings that this version does not know.
    """
    content = config.get(CONFIG_KEY) if isinstance(config, Mapping) else getattr(config, CONFIG_KEY, None)
    if not content:
        return {}
    spec = read_spec(content["mixer"])
    return {int(layer): spec for layer in content["layers"]}


def attention_of(block: nn.Module) -> tuple[str, nn.Module]:
    """Return name and module of a decoder block's attention.

    Raises:
        ValueError: the block has none with projections of its own for queries, keys, values and output.
    """
    for name, module in block.named_children():
        if all(hasattr(module, child) for child in ("q_proj", "k_proj", "v_proj", "o_proj")):
            return name, module
    raise ValueError(f"{type(block).__name__} has no attention with q_proj, k_proj, v_proj and o_proj")


def linearize_model(model: Any) -> None:
    """Put linearized attention into ``model`` where its configuration says so. May be called again."""
    wanted = linear_layers(model.config)
    if not wanted:
        return
    body = model.base_model
    for layer, spec in wanted.items():
        name, attention = attention_of(body.layers[layer])
        if not isinstance(attention, LinearAttention):
            setattr(body.layers[layer], name, LinearAttention(attention, spec, layer))
    model._is_stateful = True  # no assisted decoding: what a memory has taken in cannot be taken out
    keep = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    model._keep_in_fp32_modules_strict = keep | {"lin_"}
    if not getattr(body, "_hands_on_padding", False):
        body.register_forward_pre_hook(_hand_on_padding, with_kwargs=True)
        body._hands_on_padding = True


def _hand_on_padding(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give the layers the mask of the padded tokens, which they would otherwise see only as part of a square mask.

    Raises:
        ValueError: a mask that says more than which tokens are padding.
    """
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if mask is None:
        return args, kwargs
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError(
            "linearized attention needs an attention mask of shape (batch, tokens); a static cache, or a mask of another kind, cannot be used"
        )
    return args, {**kwargs, "padding_mask": mask}


@contextmanager
def only_parts(model: nn.Module, parts: str) -> Iterator[None]:
    """Let every linearized layer of ``model`` use some of its parts only, for a while (``mixers.spec``: WINDOW, MEMORY)."""
    layers = [module for module in model.modules() if isinstance(module, LinearAttention)]
    for module in layers:
        module.parts = parts
    try:
        yield
    finally:
        for module in layers:
            module.parts = WHOLE
