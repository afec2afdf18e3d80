"""What linearizing a model will give, and what stands against it, from headers and configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights

from compressor.engine.skeleton import Skeleton
from compressor.engine.tensorfile import Layout
from compressor.hf.linear_attention import LinearAttention
from compressor.hf.linearized import attention_of, linear_layers
from compressor.methods.linearize_settings import LinearizeSettings
from compressor.mixers.spec import MixerSpec
from compressor.run.recipe import Stage

NOT_CARRIED = {
    "attn_logit_softcapping": "caps its attention scores",
    "attention_chunk_size": "attends within chunks",
    "use_sliding_window": "has sliding windows of its own",
    "attention_sinks": "has learned attention sinks",
    "alibi": "biases its scores by distance (ALiBi)",
    "query_pre_attn_scalar": "scales its scores in its own way",
}
"""Fields of a configuration that mean a feature of the attention which a linearized layer would drop."""


def linear_stage(stages: tuple[Stage, ...]) -> Stage | None:
    """The linearizing stage of a recipe, which is its only one; None where there is none."""
    return next((stage for stage in stages if stage.kind == "linearize"), None)


def mixer_of(stage: Stage, skeleton: Skeleton) -> MixerSpec:
    """What the linearized layers of a run will compute."""
    settings = stage.settings
    assert isinstance(settings, LinearizeSettings)
    attention: Any = attention_of(skeleton.blocks[0])[1]
    return settings.mixer(stage.name, int(attention.head_dim))


def kept_count(settings: LinearizeSettings, layers: int) -> int:
    """How many layers stay softmax attention: a fraction gives at least one."""
    if settings.keep_layers:
        return len(set(settings.keep_layers))
    asked = settings.keep_attention
    if asked >= 1:
        return int(asked)
    return max(1, int(asked * layers + 0.5)) if asked else 0


def linear_violations(stage: Stage, skeleton: Skeleton, seqlen: int) -> list[str]:
    """What stands against linearizing this model, with what would mend it."""
    settings, config = stage.settings, skeleton.config.get_text_config()
    assert isinstance(settings, LinearizeSettings)
    name, layers = skeleton.checkpoint.folder.name, len(skeleton.blocks)
    if linear_layers(config):
        return [f"{name} is linearized already; start from its source"]
    if skeleton.packed:
        return [f"{name} is packed: linearize the original model first, then prune or quantize the result"]
    found = [
        f"{name} {why} ({field} in config.json), which a linearized layer would drop; this model cannot be linearized"
        for field, why in NOT_CARRIED.items()
        if getattr(config, field, None)
    ]
    types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if types or (getattr(config, "sliding_window", None) and not types and config.model_type == "mistral"):
        found.append(f"{name} has layers of other kinds already ({', '.join(sorted(types)) or 'sliding_window'})")
    try:
        for block in skeleton.blocks:
            attention_of(block)
    except ValueError as error:
        return [*found, f"{name} cannot be linearized: {error}"]
    if any(layer not in range(layers) for layer in settings.keep_layers):
        found.append(f"--keep-layers names a layer that is not there: this model has layers 0 to {layers - 1}")
    if kept_count(settings, layers) >= layers:
        found.append(f"--keep-attention leaves none of the {layers} layers to be linearized")
    spec = mixer_of(stage, skeleton)
    if spec.remembers and seqlen <= spec.window:
        found.append(
            f"windows of {seqlen} tokens fit the attention window of {spec.window}: nothing would reach the memory; "
            f"--seqlen {4 * spec.window}, or a smaller --window"
        )
    return found


def mixer_layout(skeleton: Skeleton, spec: MixerSpec, layers: list[int]) -> dict[int, Layout]:
    """Names, dtypes and shapes of the new tensors of each linearized layer."""
    out = {}
    for layer in layers:
        name, attention = attention_of(skeleton.blocks[layer])
        with init_empty_weights():
            mixer = LinearAttention(attention, spec, layer)
        path = f"{skeleton.block_names[layer]}.{name}"
        out[layer] = {
            f"{path}.{leaf}": (torch.float32, tuple(parameter.shape))
            for leaf, parameter in mixer.named_parameters()
            if leaf.startswith("lin_")
        }
    return out


def predicted_mixers(stages: tuple[Stage, ...], skeleton: Skeleton) -> dict[int, Layout]:
    """The new tensors by layer, as if the last layers stayed softmax; empty where nothing will be linearized."""
    stage = linear_stage(stages)
    if stage is None or linear_violations(stage, skeleton, 1 << 40):
        return {}
    settings, layers = stage.settings, len(skeleton.blocks)
    assert isinstance(settings, LinearizeSettings)
    kept = set(settings.keep_layers) or set(range(layers - kept_count(settings, layers), layers))
    return mixer_layout(skeleton, mixer_of(stage, skeleton), [layer for layer in range(layers) if layer not in kept])
