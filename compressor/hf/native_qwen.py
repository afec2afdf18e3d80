"""Dense Qwen3 models as stock ``qwen3_5_text``: kept layers exact, converted ones gated delta nets.

Qwen3.5's attention is Qwen3's with a gate on its output, sigmoid(0) = 1/2 when its weights are zero, which an output
projection of twice the size takes back; and its norms multiply by 1 + w. The gated delta net is that of Yang et al.
2024 (arXiv 2412.06464): S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T with q and k of length one.
"""

from __future__ import annotations

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

FAMILIES = ("qwen3",)
MIXER = "linear_attn"
"""What the target calls a converted layer, within a decoder block."""

_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_ATTENTION = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
_INTO_STUDENT = tuple(f"in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))
_INTO_MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
_KEPT = {*_HEAD_NORMS, *_ATTENTION, *_INTO_MLP, "self_attn.o_proj.weight", "mlp.down_proj.weight",
         "input_layernorm.weight", "post_attention_layernorm.weight"}  # fmt: skip


def refusals(source: Any) -> list[str]:
    """Return what of this transformers config Qwen3.5 cannot carry, each as a reason that names it."""
    reasons = shared_refusals(source)
    if getattr(source, "attention_bias", False):
        reasons.append("its attention has biases, which a gated delta net has not")
    return reasons


def native_config(source: Any, converted: Sequence[int]) -> dict[str, Any]:
    """Return the config.json of a Qwen3.5 text model whose ``converted`` layers are gated delta nets.

    Raises:
        UserError: see :func:`compressor.hf.native_source.check_converted`.
    """
    check_converted(converted, source.num_hidden_layers)
    return {"architectures": ["Qwen3_5ForCausalLM"], **_fields(source, converted)}


def _fields(source: Any, converted: Sequence[int]) -> dict[str, Any]:
    heads, dim = source.num_attention_heads, head_dim(source)
    layers = range(source.num_hidden_layers)
    return {
        "model_type": "qwen3_5_text",
        **copied(source),
        # The class would rotate a quarter of each head unless told.
        "rope_parameters": {**source.rope_parameters, "partial_rotary_factor": 1.0},
        "attention_bias": False,
        "head_dim": dim,
        "layer_types": ["linear_attention" if n in converted else "full_attention" for n in layers],
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": dim,
        "linear_value_head_dim": dim,
        "linear_conv_kernel_dim": CONV_TAPS,
    }


def less_one(weight: Tensor) -> Tensor:
    """Return a norm's weight as the target stores it, in the same dtype: the target multiplies by one plus this."""
    return (weight.double() - 1).to(weight.dtype)


def norm_error(weight: Tensor) -> float:
    """Return the largest relative error of a norm's weight (n,) once it is stored less one.

    Zero for weights of at least one half. Below, the one takes digits: in bf16 0.8 % at a quarter, and all at 0.001.
    """
    w, error = weight.double(), _absolute_error(weight)
    return float((error / w.abs()).nan_to_num(nan=0.0).max())


def _absolute_error(weight: Tensor) -> Tensor:
    # The target adds the one in fp32.
    return ((1 + less_one(weight).float()).double() - weight.double()).abs()


def needs_folding(weight: Tensor) -> bool:
    """Whether storing a norm's weight less one costs more than rounding to its dtype does."""
    return norm_error(weight) > torch.finfo(weight.dtype).eps / 2


def norm_refusals(norms: Mapping[str, Tensor], tied: bool) -> list[str]:
    """Return which norms of a model cannot be carried, each as a reason that names it.

    Norms over the hidden states fold into the matrices behind them. Norms within heads have nothing behind them to fold
    into, nor has the last norm of a model with tied embeddings: these are judged by the error against their typical
    size, since what is small in a score stays small.

    Args:
        norms: tensor name -> weight, in the dtype to be stored; others than norms are passed over.
        tied: whether the output matrix is the embedding matrix.
    """
    reasons = []
    for name, weight in norms.items():
        stuck = name.endswith(("q_norm.weight", "k_norm.weight")) or (tied and name == "model.norm.weight")
        if not stuck:
            continue
        typical = float(weight.double().square().mean().sqrt())
        error = float(_absolute_error(weight).max())
        if error > torch.finfo(weight.dtype).eps / 2 * typical:
            reasons.append(f"{name} loses {error / typical if typical else 1:.1%} when it is stored less one")
    return reasons


def native_block(tensors: Mapping[str, Tensor], student: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a block of the target.

    Args:
        tensors: all of the source's block, by name within it (``self_attn.q_proj.weight``), in the dtype to be stored.
        student: state of the gated delta net that replaces the attention, in any dtype; None keeps the attention.

    Returns:
        By name within the block.

    Raises:
        UserError: the block has a tensor that has no place in the target, or a norm that cannot be stored.
    """
    unknown = tensors.keys() - _KEPT
    if unknown:
        raise UserError(f"Qwen3.5 has no place for {min(unknown)}")
    block = {name: value for name, value in tensors.items() if not name.startswith("self_attn.")}
    if student is None:
        refused = norm_refusals(tensors, tied=False)
        if refused:
            raise UserError(refused[0])
        block |= {name: tensors[name] for name in _ATTENTION}
        block |= {name: less_one(tensors[name]) for name in _HEAD_NORMS}
        block["self_attn.o_proj.weight"] = 2 * tensors["self_attn.o_proj.weight"]
        into = _ATTENTION
    else:
        dtype = tensors["mlp.down_proj.weight"].dtype
        block |= {f"{MIXER}.{name}": value.detach().to(dtype) for name, value in student.items()}
        into = tuple(f"{MIXER}.{name}" for name in _INTO_STUDENT)
    block = _shift_norm(block, "input_layernorm.weight", into)
    block = _shift_norm(block, "post_attention_layernorm.weight", _INTO_MLP)
    if student is None:
        dim = len(tensors[_HEAD_NORMS[0]])
        block[_ATTENTION[0]] = _with_gates(block[_ATTENTION[0]], dim)
    return block


def _with_gates(q: Tensor, dim: int) -> Tensor:
    """(H d, D) -> (2 H d, D): behind each head's query rows come its gate's, which are zero."""
    each = q.reshape(-1, dim, q.shape[1])
    return torch.cat([each, torch.zeros_like(each)], dim=1).flatten(0, 1)


def _shift_norm(tensors: dict[str, Tensor], norm: str, behind: Sequence[str]) -> dict[str, Tensor]:
    """Store a norm less one; where that would hurt, as one, with its weight in the columns of the matrices behind."""
    weight = tensors[norm]
    if not needs_folding(weight):
        return tensors | {norm: less_one(weight)}
    folded = {name: (tensors[name].double() * weight.double()).to(tensors[name].dtype) for name in behind}
    return tensors | {norm: torch.zeros_like(weight)} | folded


def native_outer(tensors: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Return the tensors outside the blocks, by full name.

    Raises:
        UserError: the last norm cannot be stored, and the output matrix behind it is tied to the embeddings.
    """
    if tied:
        refused = norm_refusals(tensors, tied=True)
        if refused:
            raise UserError(refused[0])
        norm = less_one(tensors["model.norm.weight"])
        return {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"], "model.norm.weight": norm}
    return _shift_norm(dict(tensors), "model.norm.weight", ["lm_head.weight"])


def student_layer(source: Any, layer: int, attention: nn.Module) -> nn.Module:
    """Build the gated delta net of the target that stands in for an attention module.

    Its gates start at zero, and with them its output: it has no bias to hold them open. What opens them is a fit to
    hidden states (:mod:`compressor.engine.native_start`), or a few steps of training. All of it is worth training.

    Args:
        source: transformers config of the model.
        layer: number of the layer.
        attention: its loaded ``self_attn`` with q_proj, k_proj, v_proj and o_proj, and q_norm and k_norm or not.

    Returns:
        fp32 on the attention's device; called on normed hidden states (B, T, D), returns (B, T, D).
    """
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    config = Qwen3_5TextConfig(**_fields(source, [layer]))
    module = build(Qwen3_5GatedDeltaNet, config, layer, _start(source, attention))
    return module.to(attention.get_parameter("o_proj.weight").device)


def _start(source: Any, attention: nn.Module) -> dict[str, Tensor]:
    weights = {name: value.detach().float().cpu() for name, value in attention.state_dict().items()}
    heads, kv_heads, dim = source.num_attention_heads, source.num_key_value_heads, head_dim(source)
    inner, hidden = heads * dim, source.hidden_size
    k, v = (repeat_heads(weights[f"{part}_proj.weight"], kv_heads, heads // kv_heads) for part in "kv")
    # The teacher's weights within a head stand before the SiLU here; the lengths are settled by the data.
    scales = [weights.get(f"{part}_norm.weight", torch.ones(dim)).repeat(heads) for part in "qk"]
    return {
        "in_proj_qkv.weight": torch.cat([weights["q_proj.weight"], k, v]),
        "in_proj_z.weight": torch.zeros(inner, hidden),
        "in_proj_b.weight": torch.zeros(heads, hidden),
        "in_proj_a.weight": torch.zeros(heads, hidden),
        "conv1d.weight": one_tap(TAP * torch.cat([*scales, torch.ones(inner)])),
        "dt_bias": torch.full((heads,), math.log(math.expm1(1.0))),  # softplus of it is 1
        "A_log": spread_decays(heads),
        "norm.weight": torch.ones(dim),
        "out_proj.weight": weights["o_proj.weight"],
    }
