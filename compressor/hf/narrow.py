"""Which stock class and config.json say that a model is narrower inside its modules.

- Fewer neurons in every MLP: the model's own class with a smaller ``intermediate_size``.
- Narrower values: Llama and its like have one ``head_dim`` for queries, keys and values. ``mimo_v2_flash`` has a
  ``v_head_dim`` beside it, and with nothing but full attention and dense MLPs it computes what Llama, Mistral and Qwen2
  compute, from tensors of the same names: in fp32 the very same logits as their eager attention. In half precision it
  takes the softmax in half precision, where they take it in fp32. It has no SDPA attention (transformers 5.24).
- Other widths in other layers: transformers' ``per_layer_config``, for classes that build from it. None of those here
  does in 5.24; whether the installed one does is tried.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compressor.errors import UserError

CARRIER = "mimo_v2_flash"
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotations that the carrier computes alike; those that change with the length are not among them."""


@dataclass(frozen=True)
class MlpNames:
    """How an MLP is put together; names are of linears, within their decoder block.

    Attributes:
        field: the config's field for the number of neurons.
        into: linears whose rows are neurons.
        stacked: how many times the neurons are stacked in such a linear: 2 for gate and up in one matrix.
        out: the linear whose inputs are neurons.
    """

    field: str
    into: tuple[str, ...]
    stacked: int
    out: str


_GATED = MlpNames("intermediate_size", ("mlp.gate_proj", "mlp.up_proj"), 1, "mlp.down_proj")
_MLPS: dict[str, MlpNames] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", CARRIER), _GATED),
    "phi3": MlpNames("intermediate_size", ("mlp.gate_up_proj",), 2, "mlp.down_proj"),
    "gpt_neox": MlpNames("intermediate_size", ("mlp.dense_h_to_4h",), 1, "mlp.dense_4h_to_h"),
    "opt": MlpNames("ffn_dim", ("fc1",), 1, "fc2"),
}
_CARRIED = ("llama", "mistral", "qwen2")
_WHY_NOT = {
    "qwen3": "it normalizes queries and keys",
    "gemma": "it scales its embeddings and norms",
    "gemma2": "it scales its embeddings, has more norms and caps its scores",
    "gemma3_text": "it scales its embeddings, has more norms and normalizes queries and keys",
}
_COPIED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
           "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
           "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype")  # fmt: skip


def mlp_names(config: Any) -> MlpNames:
    """Return how the MLPs of a model with this transformers ``config`` are put together.

    Raises:
        UserError: MLPs of this architecture cannot be narrowed.
    """
    if config.model_type not in _MLPS:
        raise UserError(
            f"the MLPs of {config.model_type} cannot be narrowed", fix=f"this works for {', '.join(sorted(_MLPS))}"
        )
    if config.model_type == CARRIER:
        _check_carrier(config)
    return _MLPS[config.model_type]


def check_values(config: Any) -> None:
    """Refuse a model with this transformers ``config`` where no stock class has narrower values and the same outputs.

    Raises:
        UserError: names the reason.
    """
    if config.model_type == CARRIER:
        return _check_carrier(config)
    reason = _why_not_carried(config)
    if reason:
        raise UserError(
            f"no class of transformers is like this {config.model_type} model but for narrower values: {reason}",
            fix="narrow its MLPs only",
        )
    return None


def _why_not_carried(config: Any) -> str | None:
    kind = config.model_type
    if kind not in _CARRIED:
        return _WHY_NOT.get(kind, f"this is known for {', '.join(_CARRIED)} only")
    if kind != "qwen2" and getattr(config, "attention_bias", False):
        return "its output projection has a bias"
    if getattr(config, "mlp_bias", False):
        return "its MLPs have biases"
    if _slides(config):
        return "it attends within a sliding window"
    rotation = (config.rope_parameters or {}).get("rope_type")
    if rotation not in ROPE_TYPES:
        return f"its positions are of type {rotation!r}"
    if _carrier_class() is None:
        return f"the installed transformers has no {CARRIER}"
    return None


def _slides(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    return (
        any(kind != "full_attention" for kind in kinds)
        if kinds
        else getattr(config, "sliding_window", None) is not None
    )


def _check_carrier(config: Any) -> None:
    if {*config.layer_types} != {"full_attention"} or {*config.mlp_layer_types} != {"dense"}:
        raise UserError(f"this {CARRIER} model has mixtures or sliding windows, and cannot be narrowed")


def _carrier_class() -> Any:
    import transformers

    return getattr(transformers, "MiMoV2FlashConfig", None)


def head_dim(config: Any) -> int:
    """Return the dimensions of a query or key of this transformers ``config``."""
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


def value_dim(config: Any) -> int:
    """Return the dimensions of a value of this transformers ``config``."""
    return getattr(config, "v_head_dim", None) or head_dim(config)


def narrow_config(
    stored: Mapping[str, Any], config: Any, *, mlp: Sequence[int] | None = None, values: Sequence[int] | None = None
) -> dict[str, Any]:
    """Return the config.json of a model that is narrowed.

    Tensors keep their names, whatever class this is.

    Args:
        stored: the config.json of the model as it was.
        config: the same as transformers has loaded it.
        mlp: neurons, for every layer; None for as many as there are.
        values: dimensions of a value, for every layer; None, or ``head_dim`` everywhere, for values as they are.

    Raises:
        UserError: no stock class can say this.
    """
    mlp = [getattr(config, mlp_names(config).field)] * config.num_hidden_layers if mlp is None else mlp
    if values is None or {*values} == {value_dim(config)}:
        names = mlp_names(config)
        return _with_widths(dict(stored), names.field, mlp, names.out)
    check_values(config)
    carried = dict(stored) if config.model_type == CARRIER else _carrier_config(config, max(mlp))
    carried = _with_widths(carried, _GATED.field, mlp, _GATED.out)
    return _with_widths(carried, "v_head_dim", values, "self_attn.o_proj", of=config.num_attention_heads)


def _carrier_config(config: Any, neurons: int) -> dict[str, Any]:
    """The config.json of a carrier that computes what ``config`` says."""
    layers = config.num_hidden_layers
    carried = _carrier_class()(
        **{key: getattr(config, key) for key in _COPIED},
        intermediate_size=neurons,
        head_dim=head_dim(config),
        v_head_dim=head_dim(config),
        attention_bias=config.model_type == "qwen2",
        attention_value_scale=1.0,
        layer_types=["full_attention"] * layers,
        mlp_layer_types=["dense"] * layers,
        rope_parameters={"full_attention": {"partial_rotary_factor": 1.0, **config.rope_parameters}},
        # There are no experts: these fields are only given so that they do not claim any.
        n_routed_experts=1,
        num_experts_per_tok=1,
        moe_intermediate_size=neurons,
    )
    content: dict[str, Any] = json.loads(carried.to_json_string())
    return {"architectures": ["MiMoV2FlashForCausalLM"], **content}


def _with_widths(content: dict[str, Any], field: str, widths: Sequence[int], out: str, of: int = 1) -> dict[str, Any]:
    """config.json with one width of a field for all layers, or with one for each where the class builds from that.

    ``out`` is the linear in a block that has ``of`` times the width as inputs.
    """
    if len({*widths}) == 1:
        return {**content, field: widths[0]}
    layers = {int(layer): dict(entry) for layer, entry in content.get("per_layer_config", {}).items()}
    for layer, width in enumerate(widths):
        layers.setdefault(layer, {})[field] = width
    uneven = {**content, "per_layer_config": {str(layer): entry for layer, entry in sorted(layers.items())}}
    if _built_widths(uneven, out) != [of * width for width in widths]:
        raise UserError(
            f"transformers' {content['model_type']} has one {field} for all layers",
            fix="narrow all layers to the same width",
        )
    return uneven


def _built_widths(content: dict[str, Any], out: str) -> list[int] | None:
    """Inputs of the linear ``out`` of every block as transformers builds the model, without memory for it; or None."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content))
    except Exception:  # whatever a class that knows nothing of it stumbles over
        return None
    return [module.in_features for name, module in model.named_modules() if name.endswith(f".{out}")]


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes that a token adds to the cache of keys and values in ``dtype``, over all layers.

    Layers with a sliding window are counted as if the window were not full yet.

    Raises:
        UserError: the cache of this architecture holds something else than keys and values.
    """
    config = config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ["full_attention"])}
    if getattr(config, "kv_lora_rank", None) or kinds - {"full_attention", "sliding_attention"}:
        raise UserError(f"the cache of {config.model_type} is not made of keys and values alone")
    if config.model_type == CARRIER:
        _check_carrier(config)
    uneven = getattr(config, "is_heterogeneous", False)
    layers = list(config.per_layer_config) if uneven else [config] * config.num_hidden_layers
    heads = [getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads for layer in layers]
    dims = sum(count * (head_dim(layer) + value_dim(layer)) for count, layer in zip(heads, layers, strict=True))
    return int(dims * dtype.itemsize)
