"""config.json as mlx-lm reads it: what it looks for under older names than transformers writes now.

transformers 5 writes ``rope_parameters``. In most families mlx-lm 0.32 looks for ``rope_theta`` and ``rope_scaling``,
and takes a default of its own where it finds none, without a word. Both are written: nothing is left to a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.errors import UserError

FAMILIES = (
    *("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"),
    "starcoder2",
)
"""Model types whose tensors have the same names and shapes in mlx-lm, and whose logits were compared."""


OLDER = ("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern")


def mlx_config(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a folder in MLX's layout.

    Args:
        config: that of a plain checkpoint.
        quantization: ``group_size``, ``bits`` and ``mode``, and module path -> the same where they differ.
    """
    return {
        **config,
        **older_names(config.get("rope_parameters") or {}),
        **_pattern(config),
        **{key: config[key] for key in OLDER if key in config},
        "quantization": dict(quantization),
        "quantization_config": dict(quantization),  # as mlx-lm writes it, for programs that look there
    }


def older_names(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``rope_parameters`` under the names that they had before; those of sliding layers apart."""
    if "full_attention" in rope:
        local = rope.get("sliding_attention", {}).get("rope_theta")
        return {**older_names(rope["full_attention"]), **({} if local is None else {"rope_local_base_freq": local})}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    named = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    return named if scaling.get("rope_type", "default") == "default" else {**named, "rope_scaling": scaling}


def _pattern(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return which layer of how many sees everything, where mlx-lm wants to be told instead of a list of layers.

    Raises:
        UserError: these layers come in no such pattern.
    """
    kinds = list(config.get("layer_types") or ())
    if config.get("model_type") != "gemma3_text" or not kinds:
        return {}
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    if any((kind == "full_attention") != ((layer + 1) % every == 0) for layer, kind in enumerate(kinds)):
        raise UserError("mlx-lm knows no gemma3_text whose layer_types repeat no pattern", fix="--format dense")
    return {"sliding_window_pattern": every}


def ignored_window(config: Mapping[str, Any]) -> int | None:
    """Return the width of the attention window of a model that mlx-lm runs without one; None: there is none."""
    window = config.get("sliding_window")
    if config.get("model_type") in ("gemma2", "mistral", "phi3", "starcoder2") and window:
        return int(window)
    return int(window) if window and config.get("use_sliding_window") else None
