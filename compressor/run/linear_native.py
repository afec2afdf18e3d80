"""Layers that stock transformers has, in a model class that it has: a plain folder (docs/linearize-native.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.engine.distill import Kind
from compressor.engine.native_students import NativeStudents
from compressor.engine.skeleton import Skeleton
from compressor.engine.tensorfile import Layout, layout_of
from compressor.errors import UserError
from compressor.hf import native
from compressor.run.container import Container
from compressor.run.linear_models import attention_linears
from compressor.run.mixer_files import read_mixer
from compressor.run.network import load_whole


@dataclass(frozen=True)
class NativeTarget:
    """See :class:`compressor.run.linear_target.Target`."""

    method: str
    skeleton: Skeleton
    container: Container = "plain"
    trains_written: bool = True

    @property
    def source(self) -> Mapping[str, Any]:
        """The source's config.json."""
        config: Mapping[str, Any] = self.skeleton.checkpoint.config
        return config

    @property
    def students(self) -> NativeStudents:
        """Stock layers."""
        return NativeStudents(self.source, self.method)

    def content(self) -> dict[str, Any]:
        """The layer, and the class it is in."""
        return native.content(self.source, self.method)

    def violations(self, kept: int, seqlen: int) -> list[str]:
        """What the target's classes cannot say; norms are read for that, which are small."""
        name = self.skeleton.checkpoint.folder.name
        reasons = native.refusals(self.source, self.method)
        found = [f"{name} has no exact counterpart in stock transformers: {reason}" for reason in reasons]
        if not kept:
            found.append(
                f"{self.method} needs a layer of softmax attention: transformers counts the tokens of a cache there, "
                "and generate fails without one; --keep-attention 1"
            )
        if reasons:
            return found
        wanted = ("q_norm.weight", "k_norm.weight", "model.norm.weight")
        norms = {each: self.skeleton.read(each) for each in self.skeleton.origins if each.endswith(wanted)}
        try:
            native.check_norms(self.source, self.method, norms)
        except UserError as error:
            found.append(f"{name} has no exact counterpart in stock transformers: {error}")
        return found

    def layouts(self, layers: Sequence[int]) -> list[Layout]:
        """Names and shapes of the class that will be written; its tensors have the dtype of the source's."""
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**self.config(layers)))
        tied = bool(model.config.tie_word_embeddings)
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if not (tied and "lm_head" in name)}
        out: list[Layout] = [{}, *({} for _ in self.skeleton.block_names)]
        for name, shape in shapes.items():
            block = next((b for b, path in enumerate(self.skeleton.block_names) if name.startswith(f"{path}.")), None)
            likeness = f"{self.skeleton.block_names[block]}.mlp.down_proj.weight" if block is not None else name
            out[0 if block is None else block + 1][name] = (self.skeleton.stored(likeness)[0], shape)
        return out

    def shard(self, number: int, layers: Sequence[int], work: Path) -> tuple[Layout, Callable[[str], Tensor]]:
        """Made from the source's block, whole."""
        if number == 0:
            outer = {name: self.skeleton.read(name) for name in self.skeleton.outer_tensors()}
            tensors = native.native_outer(self.method, outer, tied=self.skeleton.config.tie_word_embeddings)
        else:
            prefix = f"{self.skeleton.block_names[number - 1]}."
            names = self.skeleton.block_tensors(number - 1)
            block = {name.removeprefix(prefix): self.skeleton.read(name) for name in names}
            student = read_mixer(work, number - 1) if number - 1 in layers else None
            made = native.native_block(self.method, block, student)
            tensors = {prefix + name: tensor.contiguous() for name, tensor in made.items()}
        return layout_of(tensors.items()), tensors.__getitem__

    def config(self, layers: Sequence[int]) -> dict[str, Any]:
        """That of the class that is written."""
        return native.native_config(self.source, self.method, layers)

    def student(self, dense: Any, layers: Sequence[int], work: Path, device: torch.device, *, share: bool) -> Any:
        """The written folder, by stock transformers. Nothing can be shared: the tensors are others."""
        student = load_whole(work / "model", dtype=torch.float32, device=device)
        for layer in layers:
            native.hold(self.method, student.get_submodule(self._path(layer)))
        return student

    def updated(self, student: Any, layers: Sequence[int]) -> list[str]:
        """The projections of the layers that stay softmax."""
        kept = [path for layer, path in enumerate(self.skeleton.block_names) if layer not in layers]
        return attention_linears(student, kept)

    def kind(self, name: str) -> Kind:
        """Everything in a converted layer is new."""
        if f".{native.mixer_name(self.method)}." not in name:
            return "old"
        return "gate" if name.rpartition(".")[2] in native.GATES else "new"

    def _path(self, layer: int) -> str:
        return f"{self.skeleton.block_names[layer]}.{native.mixer_name(self.method)}"
