"""What a native export needs to know of the model it starts from, and what no target can carry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import UserError

DECAYS = (0.5, 0.99)
"""What the first and the last head of a converted layer keep of their state at every token; those between are spread
evenly in log(1 - decay). Measured on windows of 256 tokens, where wider spreads and slower ones ended higher."""
TAP = 0.3
"""What the convolutions of a converted layer multiply the present token by. SiLU is nearer to a line for small numbers,
and the norms behind take any size; measured, a fifth of the error that stage 1 leaves goes with it."""
CONV_TAPS = 4
ROPE_TYPES = frozenset({"default", "linear", "dynamic", "yarn", "longrope", "llama3"})
"""Rotations that sources and targets compute by the same code of transformers."""

COPIED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
          "use_cache", "tie_word_embeddings", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
          "rope_parameters")  # fmt: skip


def source_config(config: Mapping[str, Any]) -> Any:
    """Return transformers' own reading of a config.json: defaults filled in, positions in one notation."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**config)


def head_dim(source: Any) -> int:
    """Return the dimensions of a head of this transformers config."""
    return getattr(source, "head_dim", None) or int(source.hidden_size // source.num_attention_heads)


def copied(source: Any) -> dict[str, Any]:
    """Return the part of a target's config.json that is the source's, word for word."""
    dtype = str(source.dtype).removeprefix("torch.") if source.dtype is not None else None
    fields = {field: getattr(source, field) for field in COPIED}
    return fields if dtype is None else {**fields, "dtype": dtype}


def shared_refusals(source: Any) -> list[str]:
    """Return what neither target has, each as a reason that names it."""
    reasons = []
    window = _window(source)
    if window is not None and window < source.max_position_embeddings:
        reasons.append(f"it attends within a sliding window of {window} tokens")
    if source.hidden_act not in ("silu", "swish"):
        reasons.append(f"its activation is {source.hidden_act}, and the converted layers would get it too")
    if getattr(source, "mlp_bias", False):
        reasons.append("its MLPs have biases")
    if getattr(source, "quantization_config", None):
        reasons.append("its weights are quantized")
    if getattr(source, "per_layer_config", None) and getattr(source, "is_heterogeneous", False):
        reasons.append("its layers have different widths")
    if source.num_attention_heads % source.num_key_value_heads:
        reasons.append("its query heads are not a multiple of its key heads")
    kind = source.rope_parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        reasons.append(f"its positions are of type {kind!r}")
    partial = source.rope_parameters.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        reasons.append(f"it rotates only a part ({partial}) of each head")
    return reasons


def _window(source: Any) -> int | None:
    kinds = getattr(source, "layer_types", None)
    if kinds and not any(kind == "sliding_attention" for kind in kinds):
        return None
    return getattr(source, "sliding_window", None)


def check_converted(converted: Sequence[int], layers: int) -> None:
    """Refuse layer numbers that no folder can be written for.

    Raises:
        UserError: a number is out of range or given twice, or no layer is left as it was: without one the cache of
            transformers has no length, and ``generate`` fails (5.24).
    """
    wrong = [number for number in converted if not 0 <= number < layers]
    if wrong or len({*converted}) != len(converted):
        raise UserError(f"the layers to convert must be different numbers from 0 to {layers - 1}, not {[*converted]}")
    if len(converted) == layers:
        raise UserError(
            "a native model needs one layer of softmax attention at least: transformers' cache counts tokens there",
            fix="keep a layer",
        )


def repeat_heads(tensor: Tensor, kv_heads: int, times: int) -> Tensor:
    """Repeat whole heads of key or value rows, as grouped-query attention uses them.

    Args:
        tensor: (kv_heads * d, ...) weight or bias.

    Returns:
        (kv_heads * times * d, ...): head 0 ``times`` times, then head 1, ...
    """
    each = tensor.reshape(kv_heads, -1, *tensor.shape[1:])
    return each.repeat_interleave(times, dim=0).flatten(0, 1)


def spread_decays(heads: int) -> Tensor:
    """Return ``log(-log(decay))`` (heads,) fp32 for decays spread over :data:`DECAYS`."""
    first, last = (math.log10(1 - decay) for decay in DECAYS)
    return torch.log(-torch.log1p(-torch.logspace(first, last, heads)))


def one_tap(channels: Tensor) -> Tensor:
    """Return the weight (channels, 1, taps) of a causal convolution that multiplies each channel by a number."""
    weight = torch.zeros(len(channels), 1, CONV_TAPS)
    weight[:, 0, -1] = channels
    return weight


def build(kind: type[nn.Module], config: Any, layer: int, weights: Mapping[str, Tensor]) -> nn.Module:
    """Build a stock module without its own (random) values and give it these, fp32; every one must be named.

    The global random generators are not touched.
    """
    with torch.device("meta"):
        module = kind(config, layer)
    module.load_state_dict(
        {name: value.detach().float().clone() for name, value in weights.items()}, strict=True, assign=True
    )
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module
