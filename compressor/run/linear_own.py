"""Linearized layers of our own: the source's tensors and some new ones, in a folder with a reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from compressor.engine.distill import Kind, own_kind
from compressor.engine.skeleton import Skeleton
from compressor.engine.students import OwnStudents
from compressor.engine.tensorfile import Layout
from compressor.hf.linear_attention import LinearAttention
from compressor.hf.linearized import attention_of
from compressor.methods.linearize_settings import LinearizeSettings
from compressor.mixers.spec import MixerSpec
from compressor.run.container import Container
from compressor.run.linear_models import attention_linears, linear_config, make_student
from compressor.run.mixer_files import read_mixer

NOT_CARRIED = {
    "attn_logit_softcapping": "caps its attention scores",
    "attention_chunk_size": "attends within chunks",
    "use_sliding_window": "has sliding windows of its own",
    "attention_sinks": "has learned attention sinks",
    "alibi": "biases its scores by distance (ALiBi)",
    "query_pre_attn_scalar": "scales its scores in its own way",
}
"""Fields of a configuration that mean a feature of the attention which a linearized layer would drop."""


@dataclass(frozen=True)
class OwnTarget:
    """See :class:`compressor.run.linear_target.Target`."""

    method: str
    settings: LinearizeSettings
    skeleton: Skeleton
    container: Container = "compressor"
    trains_written: bool = False

    @cached_property
    def spec(self) -> MixerSpec:
        """What the linearized layers compute."""
        attention: Any = attention_of(self.skeleton.blocks[0])[1]
        return self.settings.mixer(self.method, int(attention.head_dim))

    @property
    def students(self) -> OwnStudents:
        """Layers of our own."""
        return OwnStudents(self.spec)

    def content(self) -> dict[str, Any]:
        """As in config.json."""
        return self.spec.content()

    def violations(self, kept: int, seqlen: int) -> list[str]:
        """Features that would be dropped, layers of other kinds, windows that reach no memory."""
        name, config = self.skeleton.checkpoint.folder.name, self.skeleton.config.get_text_config()
        found = [
            f"{name} {why} ({field} in config.json), which a linearized layer would drop; this model cannot be "
            "linearized"
            for field, why in NOT_CARRIED.items()
            if getattr(config, field, None)
        ]
        types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if types or (getattr(config, "sliding_window", None) and not types and config.model_type == "mistral"):
            found.append(f"{name} has layers of other kinds already ({', '.join(sorted(types)) or 'sliding_window'})")
        if self.spec.remembers and seqlen <= self.spec.window:
            found.append(
                f"windows of {seqlen} tokens fit the attention window of {self.spec.window}: nothing would reach the "
                f"memory; --seqlen {4 * self.spec.window}, or a smaller --window"
            )
        return found

    def layouts(self, layers: Sequence[int]) -> list[Layout]:
        """The source's tensors, and the new ones in fp32."""
        return [self._layout(number, layers) for number in range(len(self.skeleton.block_names) + 1)]

    def shard(self, number: int, layers: Sequence[int], work: Path) -> tuple[Layout, Callable[[str], Tensor]]:
        """Read lazily, a tensor at a time."""
        new: dict[str, Tensor] = {}
        if number - 1 in layers:
            tensors = read_mixer(work, number - 1)
            new = {f"{self._path(number - 1)}.{name}": tensor for name, tensor in tensors.items()}

        def read(name: str) -> Tensor:
            if name in new:
                return new[name]
            return self.skeleton.read(name) if name in self.skeleton.origins else self.skeleton.checkpoint.read(name)

        return self._layout(number, layers), read

    def config(self, layers: Sequence[int]) -> dict[str, Any]:
        """The source's, which layers are linearized, and how."""
        return linear_config(self.skeleton, layers, self.spec)

    def student(self, dense: Any, layers: Sequence[int], work: Path, device: torch.device, *, share: bool) -> Any:
        """The class of our own with the weights of ``dense``."""
        mixers = {
            f"{self._path(layer)}.{name}": tensor
            for layer in layers
            for name, tensor in read_mixer(work, layer).items()
        }
        return make_student(self.skeleton, dense, layers, self.spec, mixers, share=share)

    def updated(self, student: Any, layers: Sequence[int]) -> list[str]:
        """The projections of every attention, softmax or linearized."""
        return attention_linears(student, self.skeleton.block_names)

    def kind(self, name: str) -> Kind:
        """By its name."""
        return own_kind(name)

    def _path(self, layer: int) -> str:
        return f"{self.skeleton.block_names[layer]}.{attention_of(self.skeleton.blocks[layer])[0]}"

    def _layout(self, number: int, layers: Sequence[int]) -> Layout:
        skeleton = self.skeleton
        if number == 0:
            entries = {name: skeleton.checkpoint.tensors[name] for name in skeleton.extra}
            outer: Layout = {name: skeleton.stored(name) for name in skeleton.outer_tensors()}
            return outer | {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        layout: Layout = {name: skeleton.stored(name) for name in skeleton.block_tensors(number - 1)}
        return layout | (self._new(number - 1) if number - 1 in layers else {})

    def _new(self, layer: int) -> Layout:
        """Names, dtypes and shapes of the new tensors of a linearized layer."""
        with init_empty_weights():
            mixer = LinearAttention(attention_of(self.skeleton.blocks[layer])[1], self.spec, layer)
        return {
            f"{self._path(layer)}.{leaf}": (torch.float32, tuple(parameter.shape))
            for leaf, parameter in mixer.named_parameters()
            if leaf.startswith("lin_")
        }
