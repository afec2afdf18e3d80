"""Puts linearized attention into a model whose configuration asks for it, and gives its layers what they need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from compressor.hf.linear_attention import OWN, LinearAttention
from compressor.mixers.spec import WHOLE, MixerSpec, read_spec

CONFIG_KEY = "linear_attention"
"""In config.json: ``layers``, the indices of the linearized ones, and ``mixer``, what they compute."""

PADDING = "padding_mask"
"""Argument under which a body hands on which of its tokens are padding."""


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


def obstacle(attention: Any, spec: MixerSpec) -> str | None:
    """Say what a linearized layer could not take over from a softmax attention; None: nothing that its looks betray.

    Args:
        attention: with projections of its own (:func:`attention_of`), loaded or on the meta device.
        spec: what is to take its place.
    """
    if not all(hasattr(attention, name) for name in ("head_dim", "config")):
        return "it does not say how wide its heads are"
    children = {name for name, child in attention.named_children() if next(child.parameters(), None) is not None}
    if more := sorted({*children, *dict(attention.named_parameters(recurse=False))} - set(OWN)):
        return f"its {more[0]} would be lost"
    heads, rest = divmod(attention.q_proj.out_features, attention.head_dim)
    if rest or attention.o_proj.in_features != heads * attention.head_dim:
        return "its projections are not one query and one output per head"
    if attention.k_proj.out_features != attention.v_proj.out_features:
        return "its keys and values differ in width"
    if heads % (attention.k_proj.out_features // attention.head_dim):
        return "its query heads do not divide among its key heads"
    norm = getattr(getattr(attention, "q_norm", None), "weight", None)
    if norm is not None and tuple(norm.shape) != (attention.head_dim,):
        return "its queries are normed over more than a head"
    for name in ("attn_logit_softcapping", "clip_qkv"):
        if getattr(attention, name, None) or getattr(attention.config, name, None):
            return f"{name} changes its scores"
    sliding = sliding_window(attention)
    if sliding and sliding <= spec.window:
        return f"it sees {sliding} tokens already, no more than the {spec.window} of the window"
    return None


def sliding_window(attention: Any) -> int | None:
    """Return how many tokens a softmax attention sees; None: all of them."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or None
    kinds = getattr(attention.config, "layer_types", None)
    if kinds and kinds[attention.layer_idx] != "sliding_attention":
        return None
    return getattr(attention.config, "sliding_window", None) or None


def linearize_model(model: Any) -> None:
    """Put linearized attention into ``model`` where its configuration says so. May be called again.

    Raises:
        ValueError: a layer's attention cannot be replaced (:func:`obstacle`).
    """
    wanted = linear_layers(model.config)
    if not wanted:
        return
    body = model.base_model
    given = _padding_of(body)
    for layer, spec in wanted.items():
        name, attention = attention_of(body.layers[layer])
        if not isinstance(attention, LinearAttention):
            if why := obstacle(attention, spec):
                raise ValueError(f"{type(attention).__name__} of layer {layer} cannot be linearized: {why}")
            block = body.layers[layer]
            setattr(block, name, linear := LinearAttention(attention, spec, layer))
            linear.register_forward_pre_hook(partial(_take_padding, block, given), with_kwargs=True)
    model._is_stateful = True  # no assisted decoding: what a memory has taken in cannot be taken out
    keep = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    model._keep_in_fp32_modules_strict = keep | {"lin_"}


def _padding_of(body: Any) -> dict[str, Any]:
    """Return the place where ``body`` leaves its mask during a forward pass, for layers that are not handed it."""
    if not hasattr(body, "_given_padding"):
        body._given_padding = {}
        body.register_forward_pre_hook(partial(_hand_on_padding, body._given_padding), with_kwargs=True)
        body.register_forward_hook(partial(_forget_padding, body._given_padding), always_call=True)
    return body._given_padding  # type: ignore[no-any-return]


def _forget_padding(given: dict[str, Any], *_: Any) -> None:
    given.clear()


def _take_padding(
    block: Any, given: dict[str, Any], attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give an attention what its body was given, where the block does not hand it on (StableLM's).

    Raises:
        ValueError: there is padding, and gradient checkpointing will compute the block again when the body is done.
    """
    if PADDING in kwargs or PADDING not in given:
        return args, kwargs
    again = block.training and getattr(block, "gradient_checkpointing", False) and torch.is_grad_enabled()
    if again and not bool(given[PADDING].all()):
        raise ValueError(
            f"{type(block).__name__} forgets the padding when it is computed again: train it without padding, "
            "or without gradient checkpointing"
        )
    return args, {**kwargs, **given}


def _hand_on_padding(
    given: dict[str, Any], body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Give the layers the mask of the padded tokens, which they would otherwise see only as part of a square mask.

    Raises:
        ValueError: a mask that says more than which tokens are padding.
    """
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if mask is None:
        return args, kwargs
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError(
            "linearized attention needs an attention mask of shape (batch, tokens); a static cache, or a mask of "
            "another kind, cannot be used"
        )
    given[PADDING] = mask
    return args, {**kwargs, PADDING: mask}


@contextmanager
def only_parts(model: nn.Module, parts: str) -> Iterator[None]:
    """Let every linearized layer of ``model`` use one of its parts only, for a while (``spec.WINDOW``, ``MEMORY``)."""
    layers = [module for module in model.modules() if isinstance(module, LinearAttention)]
    for module in layers:
        module.parts = parts
    try:
        yield
    finally:
        for module in layers:
            module.parts = WHOLE
