"""The dense and the linearized model as transformers models, held in memory together for distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from compressor.engine.lora import LoraLinear
from compressor.engine.sharding import whole
from compressor.engine.skeleton import Skeleton
from compressor.hf.linearized import CONFIG_KEY, attention_of
from compressor.hf.loading import packed_config_class, packed_model_class
from compressor.hf.reader import packed_config, source_config
from compressor.kernels.native import using
from compressor.mixers.spec import MixerSpec
from compressor.run.network import load_whole

UPDATED = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Linears of an attention that get low-rank updates."""


def linear_config(skeleton: Skeleton, layers: Sequence[int], spec: MixerSpec) -> dict[str, Any]:
    """The content of config.json of the linearized model."""
    plain = source_config(skeleton.checkpoint.config)
    return packed_config({**plain, CONFIG_KEY: {"layers": list(layers), "mixer": spec.content()}}, {})


def load_dense(skeleton: Skeleton, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool) -> Any:
    """The source, whole."""
    with using("packed"):  # it is learned from, not hurried
        model = load_whole(skeleton.checkpoint.folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return model.requires_grad_(False)


def make_student(
    skeleton: Skeleton, dense: Any, layers: Sequence[int], spec: MixerSpec, mixers: Mapping[str, Tensor], *, share: bool
) -> Any:
    """The linearized model with the weights of ``dense``.

    Args:
        mixers: new tensors by their names in the model.
        share: whether the weights are those of ``dense`` themselves, not copies; they must not be trained then.
    """
    config = packed_config_class(skeleton.config.model_type).from_dict(linear_config(skeleton, layers, spec))
    with init_empty_weights(include_buffers=False):
        made: Any = packed_model_class(type(config))  # type: ignore[arg-type]
        student = made(config)
    weights = {name: value if share else value.clone() for name, value in dense.state_dict().items()}
    device = dense.device
    student.load_state_dict({**weights, **{name: value.to(device) for name, value in mixers.items()}}, assign=True)
    student.tie_weights()
    return student.to(device).eval()


def attention_linears(model: Any, blocks: Sequence[str]) -> list[str]:
    """Paths of the projections of the attention in each of these blocks."""
    found = [(name, attention_of(model.get_submodule(name))[0]) for name in blocks]
    return [f"{name}.{attention}.{leaf}" for name, attention in found for leaf in UPDATED]


def trained_tensors(student: Any, updates: Mapping[str, LoraLinear]) -> dict[str, Tensor]:
    """What training has changed, by module tensor name: updates are merged into their matrices.

    Every process must ask for it where the model is sharded."""
    tensors: dict[str, Tensor] = {f"{path}.weight": update.weight.cpu() for path, update in updates.items()}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            tensors[name] = whole(parameter.detach()).cpu()
    return tensors
