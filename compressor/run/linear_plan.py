"""What linearizing a model will give, and what stands against it, from headers and configuration alone."""

from __future__ import annotations

from compressor.engine.skeleton import Skeleton
from compressor.engine.teacher_logits import stored_bytes
from compressor.engine.tensorfile import Layout
from compressor.hf.linearized import attention_of, linear_layers
from compressor.hf.native import METHODS, refusals
from compressor.methods.linearize_settings import LinearizeSettings
from compressor.run.linear_target import target_of
from compressor.run.recipe import Stage


def linear_stage(stages: tuple[Stage, ...]) -> Stage | None:
    """The linearizing stage of a recipe, which is its only one; None where there is none."""
    return next((stage for stage in stages if stage.kind == "linearize"), None)


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
    settings = stage.settings
    assert isinstance(settings, LinearizeSettings)
    name, layers = skeleton.checkpoint.folder.name, len(skeleton.blocks)
    if linear_layers(skeleton.config.get_text_config()):
        return [f"{name} is linearized already; start from its source"]
    if skeleton.packed:
        return [f"{name} is packed: linearize the original model first, then prune or quantize the result"]
    try:
        for block in skeleton.blocks:
            attention_of(block)
    except ValueError as error:
        return [f"{name} cannot be linearized: {error}"]
    found, kept = _storing(settings), kept_count(settings, layers)
    if any(layer not in range(layers) for layer in settings.keep_layers):
        found.append(f"--keep-layers names a layer that is not there: this model has layers 0 to {layers - 1}")
    if kept >= layers:
        found.append(f"--keep-attention leaves none of the {layers} layers to be linearized")
    return found + target_of(stage, skeleton).violations(kept, seqlen)


def _storing(settings: LinearizeSettings) -> list[str]:
    """What stands against putting the dense model's predictions on disk."""
    if not settings.store_logits:
        return []
    if settings.trained == "none":
        return ["--store-logits is for training end to end, and --train none forbids that; leave one of them out"]
    if not settings.top_k:
        return ["--store-logits keeps the largest predictions of each token, and --top-k 0 wants all; --top-k 64"]
    return []


def logits_bytes(stages: tuple[Stage, ...], skeleton: Skeleton, tokens: int) -> int:
    """Bytes that the dense model's predictions for so many tokens take on disk; 0 where they are not put there."""
    stage = linear_stage(stages)
    if stage is None or not isinstance(stage.settings, LinearizeSettings) or not stage.settings.store_logits:
        return 0
    return stored_bytes(tokens, stage.settings.top_k, skeleton.config.get_text_config().vocab_size)


def linear_layouts(stages: tuple[Stage, ...], skeleton: Skeleton) -> list[Layout] | None:
    """Contents of every shard, as if the last layers stayed softmax; None where nothing will be linearized."""
    stage = linear_stage(stages)
    if stage is None or linear_violations(stage, skeleton, 1 << 40):
        return None
    settings, layers = stage.settings, len(skeleton.blocks)
    assert isinstance(settings, LinearizeSettings)
    kept = set(settings.keep_layers) or set(range(layers - kept_count(settings, layers), layers))
    return target_of(stage, skeleton).layouts([layer for layer in range(layers) if layer not in kept])


def linear_advice(stages: tuple[Stage, ...], skeleton: Skeleton) -> list[str]:
    """What else could be asked for: a result that needs no code of ours, where there is one for this model."""
    stage = linear_stage(stages)
    if stage is None or target_of(stage, skeleton).container == "plain":
        return []
    return [
        f"--method {method} makes a checkpoint that stock transformers loads, where that matters"
        for method in METHODS
        if not refusals(skeleton.checkpoint.config, method)
    ]


def training_bytes(stages: tuple[Stage, ...], skeleton: Skeleton) -> int:
    """Bytes of weights, gradients and moments while the whole model is trained, without activations; 0 where it is not.

    Both models are held in fp32, but for a dense one whose predictions are on disk. Low-rank updates leave the weights
    shared, but for layers of stock transformers.
    """
    stage = linear_stage(stages)
    if stage is None or not isinstance(stage.settings, LinearizeSettings) or stage.settings.trained == "none":
        return 0
    whole, alone = 4 * skeleton.parameters(), stage.settings.store_logits
    if stage.settings.trained == "full":
        return (4 if alone else 5) * whole
    return 2 * whole if target_of(stage, skeleton).trains_written and not alone else whole
