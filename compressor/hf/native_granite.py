"""Dense Llama, Mistral and Qwen2 models as stock ``granitemoehybrid``: kept layers exact, converted ones Mamba-2.

With no experts, multipliers of one and rotary positions, a Granite hybrid computes what Llama computes. Its Mamba-2
layer with as many groups as heads is gated linear attention (Dao and Gu 2024, arXiv 2405.21060): x <- v, B <- k,
C <- q, out <- o, as MambaInLlama has it (arXiv 2408.15237). It has no positions, a SiLU after the convolution and a
norm over each head's output, so that it cannot start as a copy. Before transformers 5.23 that norm is over all heads
together: the same tensors are another model there, and nothing says so (:func:`norms_each_head`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import UserError
from compressor.hf.native_source import (
    CONV_TAPS,
    TAP,
    build,
    check_converted,
    copied,
    head_dim,
    one_tap,
    repeat_heads,
    shared_refusals,
    spread_decays,
)

FAMILIES = ("llama", "mistral", "qwen2")
MIXER = "mamba"
"""What the target calls a converted layer, within a decoder block."""
GATE = 1.0
"""Where the gates of a converted layer start: SiLU(1) = 0.73 for every channel and token."""

_CHUNK = 64  # plain PyTorch fills every chunk up with zeros, and its work grows with their square
_KEPT = {f"self_attn.{part}_proj.weight" for part in "qkvo"} | {"input_layernorm.weight", "mlp.down_proj.weight",
        "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"}  # fmt: skip
_BIASES = {f"self_attn.{part}_proj.bias" for part in "qkvo"}


def refusals(source: Any) -> list[str]:
    """Return what of this transformers config a Granite hybrid cannot carry, each as a reason that names it."""
    reasons = shared_refusals(source)
    inner, hidden = source.num_attention_heads * head_dim(source), source.hidden_size
    if inner % hidden:
        reasons.append(f"its heads are {inner} wide together, which is not a multiple of its hidden size {hidden}")
    return reasons


def norms_each_head() -> bool:
    """Whether the installed transformers norms every head of a Mamba-2 layer alone (5.23 and later), as vLLM does."""
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated

    return "group_size" in inspect.signature(GraniteMoeHybridRMSNormGated).parameters


def native_config(source: Any, converted: Sequence[int]) -> dict[str, Any]:
    """Return the config.json of a Granite hybrid whose ``converted`` layers are Mamba-2.

    Layers are named as in published Granite checkpoints, ``mamba`` and ``attention``: every version of transformers
    and other runtimes know these words.

    Raises:
        UserError: see :func:`compressor.hf.native_source.check_converted`.
    """
    check_converted(converted, source.num_hidden_layers)
    return {"architectures": ["GraniteMoeHybridForCausalLM"], **_fields(source, converted)}


def _fields(source: Any, converted: Sequence[int]) -> dict[str, Any]:
    heads, dim = source.num_attention_heads, head_dim(source)
    fields = {
        "model_type": "granitemoehybrid",
        **copied(source),
        "shared_intermediate_size": source.intermediate_size,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "attention_bias": _has_bias(source),
        "attention_multiplier": dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "position_embedding_type": "rope",
        "layer_types": ["mamba" if n in converted else "attention" for n in range(source.num_hidden_layers)],
        "mamba_n_heads": heads,
        "mamba_n_groups": heads,
        "mamba_d_head": dim,
        "mamba_d_state": dim,
        "mamba_d_conv": CONV_TAPS,
        "mamba_expand": heads * dim // source.hidden_size,
        "mamba_chunk_size": _CHUNK,
        "mamba_conv_bias": True,
        "mamba_proj_bias": True,
    }
    # The class has no such field, but takes it; written only where it says something.
    return fields if dim * heads == source.hidden_size else {**fields, "head_dim": dim}


def _has_bias(source: Any) -> bool:
    return source.model_type == "qwen2" or bool(getattr(source, "attention_bias", False))


def native_block(tensors: Mapping[str, Tensor], student: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a block of the target.

    Args:
        tensors: all of the source's block, by name within it (``self_attn.q_proj.weight``), in the dtype to be stored.
        student: state of the Mamba-2 layer that replaces the attention, in any dtype; None keeps the attention.

    Returns:
        By name within the block. What is kept are the very same tensors, but for gate and up, which are stacked.

    Raises:
        UserError: the block has a tensor that has no place in the target.
    """
    unknown = tensors.keys() - _KEPT - _BIASES
    if unknown:
        raise UserError(f"a Granite hybrid has no place for {min(unknown)}")
    gate_up = [tensors["mlp.gate_proj.weight"], tensors["mlp.up_proj.weight"]]
    block = {name: tensors[name] for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
    block["shared_mlp.input_linear.weight"] = torch.cat(gate_up)
    block["shared_mlp.output_linear.weight"] = tensors["mlp.down_proj.weight"]
    if student is not None:
        dtype = tensors["mlp.down_proj.weight"].dtype
        return block | {f"{MIXER}.{name}": value.detach().to(dtype) for name, value in student.items()}
    block |= {name: value for name, value in tensors.items() if name.startswith("self_attn.")}
    if "self_attn.q_proj.bias" in tensors and "self_attn.o_proj.bias" not in tensors:
        o_weight = tensors["self_attn.o_proj.weight"]
        block["self_attn.o_proj.bias"] = torch.zeros_like(o_weight[:, 0])
    return block


def native_outer(tensors: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Return the tensors outside the blocks: the same under the same names."""
    return {name: value for name, value in tensors.items() if not (tied and name == "lm_head.weight")}


def student_layer(source: Any, layer: int, attention: nn.Module) -> nn.Module:
    """Build the Mamba-2 layer of the target that stands in for an attention module.

    Trainable and worth training: everything. The slice of ``in_proj.bias`` that leads into the convolution gets no
    gradient (:func:`hold`), because it would be there at padded positions too; the convolution's own bias does its
    work.

    Args:
        source: transformers config of the model.
        layer: number of the layer.
        attention: its loaded ``self_attn`` with q_proj, k_proj, v_proj and o_proj, with or without biases.

    Returns:
        fp32 on the attention's device; called on normed hidden states (B, T, D), returns (B, T, D).
    """
    from transformers.models.granitemoehybrid.configuration_granitemoehybrid import GraniteMoeHybridConfig
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

    config = GraniteMoeHybridConfig(**_fields(source, [layer]))
    module = build(GraniteMoeHybridMambaLayer, config, layer, _start(source, attention))
    module = module.to(attention.get_parameter("o_proj.weight").device)
    hold(module)
    return module


def hold(layer: nn.Module) -> None:
    """Let the slice of a layer's ``in_proj.bias`` that leads into the convolution have no gradient from now on."""
    inner = len(layer.get_parameter("norm.weight"))
    free = torch.ones_like(layer.get_parameter("in_proj.bias"), requires_grad=False)
    free[inner : 4 * inner] = 0
    held: list[Tensor] = []

    def before(module: nn.Module, args: Any) -> None:
        bias = module.get_parameter("bias")  # another one than today's where the model is sharded later
        if bias.requires_grad and not any(bias is known for known in held):
            held.append(bias)
            bias.register_hook(lambda gradient: gradient * free.to(gradient))  # type: ignore[no-untyped-call]

    layer.get_submodule("in_proj").register_forward_pre_hook(before)


def _start(source: Any, attention: nn.Module) -> dict[str, Tensor]:
    weights = {name: value.detach().float().cpu() for name, value in attention.state_dict().items()}
    heads, kv_heads, dim = source.num_attention_heads, source.num_key_value_heads, head_dim(source)
    inner, hidden = heads * dim, source.hidden_size

    def rows(part: str, leaf: str, otherwise: Tensor) -> Tensor:
        value = weights.get(f"{part}_proj.{leaf}")
        if value is None:
            return otherwise
        return value if part == "q" else repeat_heads(value, kv_heads, heads // kv_heads)

    none = torch.zeros(inner)
    v, k, q = (rows(part, "weight", none) for part in "vkq")
    return {
        # [gate, x, B, C, dt]
        "in_proj.weight": torch.cat([torch.zeros(inner, hidden), v, k, q, torch.zeros(heads, hidden)]),
        "in_proj.bias": torch.cat([torch.full((inner,), GATE), torch.zeros(3 * inner + heads)]),
        "conv1d.weight": one_tap(torch.full((3 * inner,), TAP)),
        "conv1d.bias": TAP * torch.cat([rows(part, "bias", none) for part in "vkq"]),
        "dt_bias": torch.full((heads,), math.log(math.expm1(1.0))),  # softplus of it is 1
        "A_log": spread_decays(heads),
        "D": torch.zeros(heads),
        "norm.weight": torch.ones(inner),
        "out_proj.weight": weights["o_proj.weight"],
        "out_proj.bias": weights.get("o_proj.bias", torch.zeros(hidden)),
    }
