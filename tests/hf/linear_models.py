"""Tiny linearized models of several families, with weights large enough for attention to matter."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from compressor.hf.loading import packed_config_class, register
from compressor.methods.linearize_native import NATIVE
from compressor.methods.linearize_settings import LINEARIZE_METHODS
from compressor.mixers.spec import MixerSpec

register()
WINDOW, HEAD = 12, 8
_SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "initializer_range": 0.25,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "tie_word_embeddings": True},
    "mistral": {**_SIZES, "sliding_window": None},
    "qwen2": _SIZES,
    "qwen3": {**_SIZES, "head_dim": HEAD},
    "stablelm": {
        **_SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    },
}  # fmt: skip
"""model_type -> configuration: biases (qwen2), q_norm (qwen3), partial rotation (stablelm), tied embeddings (llama)."""


def method_spec(name: str, **settings: Any) -> MixerSpec:
    """The spec of a method with a window of WINDOW tokens, where it has one."""
    chosen = LINEARIZE_METHODS[name]
    if chosen.model_fields.get("window") is not None and chosen.model_fields["window"].default:
        settings = {"window": WINDOW, **settings}
    return chosen(**settings).mixer(name, HEAD)


SPECS: dict[str, MixerSpec] = {
    **{name: method_spec(name) for name in LINEARIZE_METHODS if name not in NATIVE},
    "windowed, no gate, wide": method_spec("windowed", gate="none", features=2.0, rope=False),
    "lawcat, window": method_spec("lawcat", window=WINDOW, sinks=2),
    "supra, map per head": method_spec("supra", dense=False),
    "windowed, weighed by queries": replace(method_spec("windowed"), per_query=True),
    "refined under a window": MixerSpec("x", WINDOW, 2, "shared", 6, "relu", "refined"),
}
EXACT = [name for name, spec in SPECS.items() if spec.exact]
FAMILY_OF = {name: sorted(FAMILIES)[number % len(FAMILIES)] for number, name in enumerate(SPECS)}
"""Each spec is tried on one family, where trying it on all would take too long."""


@cache
def teacher(family: str) -> Any:
    """A random model in double precision; biases and norms are random as well."""
    generator = torch.Generator().manual_seed(5)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for name, parameter in model.named_parameters():
        about = 1.0 if "norm" in name else 0.0
        spread = 0.1 if parameter.dim() == 1 else 0.25
        parameter.data = about + spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def linearized(family: str, spec: MixerSpec, layers: tuple[int, ...] = (0, 1, 2), dtype: Any = torch.float64) -> Any:
    """The teacher with linearized layers whose new parameters are random."""
    content = {"layers": list(layers), "mixer": spec.content()}
    config = packed_config_class(family)(**FAMILIES[family], linear_attention=content)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    lost = model.load_state_dict(teacher(family).state_dict(), strict=False)
    assert not lost.unexpected_keys and all(".lin_" in name for name in lost.missing_keys)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if ".lin_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += (0.3 * noise).to(parameter.dtype)
    return model


@cache
def student(name: str) -> Any:
    """The linearized model of a spec, not to be changed."""
    return linearized(FAMILY_OF[name], SPECS[name])


def some_ids(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Random token ids (rows, tokens), without padding."""
    return torch.randint(2, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))
