"""Packed folders in vLLM: what the entry point ``vllm.general_plugins`` calls. Written to vLLM 0.33, NOT YET RUN ON IT.

How vLLM comes to it, in every one of its processes: it calls :func:`register`; by then this package has been imported,
so that ``AutoConfig`` reads ``model_type: compressor`` as a configuration of the base family, with the family's
architecture and with ``quant_method: compressor`` in its ``quantization_config``. vLLM so builds its own model of that
family, and asks the class registered here what to do for each of its layers.

What is done is plain: the parts of a matrix are kept as they come from the files, in the order in which vLLM joins
layers (q, k and v in one; gate and up in one), and are unpacked once, when all are there. So weights take the memory
of dense ones; on disk they do not. Matrices are not divided: ``tensor_parallel_size`` must be 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from compressor.formats.parts import Spec
from compressor.formats.registry import borrowed, format_of
from compressor.hf.manifest import FORMAT_VERSION, MODEL_TYPE

SHARDS = {"q": 0, "k": 1, "v": 2}
"""What vLLM calls the members of its joined attention layer; those of others are numbers."""


def register() -> None:
    """Teach vLLM our folders. May be called again, as vLLM does."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    register_quantization_config(MODEL_TYPE)(config_class())


@dataclass(frozen=True)
class Member:
    """One of the matrices that are one layer in vLLM. ``spec`` is None for one that is stored dense."""

    name: str
    spec: Spec | None


@dataclass(frozen=True)
class Aside:
    """What has come of a layer's matrices.

    Attributes:
        starts: the row of the layer's weight where each begins.
        parts: of each, by part name.
    """

    starts: list[int]
    parts: list[dict[str, Tensor]]


def members_of(prefix: str, joined: Mapping[str, Sequence[str]], modules: Mapping[str, Spec]) -> list[Member]:
    """Return the matrices of a layer of vLLM, in the order in which it joins their outputs.

    Args:
        prefix: path of the layer, such as ``model.layers.0.self_attn.qkv_proj``.
        joined: name of a layer -> names of those that it is made of (``packed_modules_mapping``).
        modules: module path -> spec: the manifest.

    Raises:
        ValueError: a member shares a factor with a layer that is not joined with it.
    """
    parent, dot, last = prefix.rpartition(".")
    names = [f"{parent}{dot}{name}" for name in joined.get(last, [last])]
    specs = [spec if (spec := modules.get(name)) and spec["format"] != "dense" else None for name in names]
    for name, spec in zip(names, specs, strict=True):
        if spec is not None and spec.get("shared", name) not in names:
            raise ValueError(f"{name} shares a factor with {spec['shared']}, another layer of vLLM")
    return [Member(name, spec) for name, spec in zip(names, specs, strict=True)]


def create(layer: nn.Module, members: Sequence[Member], sizes: Sequence[int], width: int, dtype: torch.dtype) -> None:
    """Give a layer its ``weight``, still empty, and for every part in the files a parameter of that name.

    The parameters of parts hold nothing: their ``weight_loader`` puts what comes aside, by member.

    Args:
        layer: of vLLM.
        members: its matrices.
        sizes: outputs of each, as vLLM has it; an embedding's may be padded.
        width: inputs.
        dtype: of the weight.

    Raises:
        ValueError: a matrix of another shape than vLLM expects.
    """
    if len(members) != len(sizes):
        raise ValueError(f"vLLM joins {len(sizes)} matrices, of which {[member.name for member in members]} are known")
    aside = Aside([sum(sizes[:place]) for place in range(len(sizes))], [{} for _ in members])
    layer.__dict__[_ASIDE] = aside
    _hold(layer, "weight", torch.zeros(sum(sizes), width, dtype=dtype), partial(_take_dense, aside))
    for member, size in zip(members, sizes, strict=True):
        if member.spec is None:
            continue
        rows, columns = member.spec["shape"]
        if columns != width or rows > size:
            raise ValueError(f"{member.name} is {rows} x {columns}, vLLM expects {size} x {width}")
        for part, (_, part_dtype) in format_of(member.spec).layout(member.spec).items():
            if not hasattr(layer, f"weight_{part}"):
                _hold(layer, f"weight_{part}", torch.empty(0, dtype=part_dtype), partial(_take_part, aside, part))


def finish(layer: nn.Module, members: Sequence[Member]) -> None:
    """Unpack what was put aside into ``weight``, in place, since a head may share it; the parts are let go.

    Does nothing a second time.

    Raises:
        ValueError: a part has not come, or is not as its spec says.
    """
    aside: Aside | None = layer.__dict__.pop(_ASIDE, None)
    if aside is None:
        return
    weight, names = layer.get_parameter("weight"), [member.name for member in members]
    for member, start, parts in zip(members, aside.starts, aside.parts, strict=True):
        if member.spec is None:
            continue
        lent = borrowed(member.spec, aside.parts[names.index(member.spec["shared"])]) if "shared" in member.spec else {}
        try:
            matrix = format_of(member.spec).unpack({**parts, **lent}, member.spec)
        except ValueError as error:
            raise ValueError(f"{member.name}: {error}") from error
        weight.data[start : start + len(matrix)].copy_(matrix)
    for name in [name for name, _ in layer.named_parameters(recurse=False) if name.startswith("weight_")]:
        delattr(layer, name)


_ASIDE = "compressor_aside"


def _hold(layer: nn.Module, name: str, data: Tensor, take: Callable[..., None]) -> None:
    parameter = nn.Parameter(data, requires_grad=False)
    parameter.weight_loader = take  # type: ignore[attr-defined]
    layer.register_parameter(name, parameter)


def _place(loaded: Tensor, shard: str | int | None) -> int:
    """Which member a tensor is of: vLLM 0.33 says so by an attribute of the tensor, older models by an argument."""
    shard = getattr(loaded, "shard_id", None) if shard is None else shard
    return 0 if shard is None else SHARDS[shard] if isinstance(shard, str) else shard


def _take_dense(aside: Aside, param: Tensor, loaded: Tensor, shard: str | int | None = None) -> None:
    start = aside.starts[_place(loaded, shard)]
    param.data[start : start + len(loaded)].copy_(loaded)


def _take_part(aside: Aside, part: str, param: Tensor, loaded: Tensor, shard: str | int | None = None) -> None:
    aside.parts[_place(loaded, shard)][part] = loaded


def refuse_unknown(config: Any) -> None:
    """Refuse what vLLM's own model of a family does not compute. ``config`` is the model's configuration.

    Raises:
        ValueError: layers with linearized attention.
    """
    from compressor.hf.linearized import linear_layers  # which needs transformers

    if linear_layers(config):
        raise ValueError(
            "vLLM does not know the linearized attention of this folder; transformers with compressor does"
        )


@cache
def config_class() -> Any:
    """Return the class that vLLM asks about each layer, made from vLLM's own base classes."""
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    class CompressorLinearMethod(LinearMethodBase):  # type: ignore[misc]
        """Packed matrices that are unpacked when all their parts are there."""

        def __init__(self, members: list[Member]) -> None:
            self.members = members

        def create_weights(
            self,
            layer: nn.Module,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            input_size: int,
            output_size: int,
            params_dtype: torch.dtype,
            **extra_weight_attrs: Any,
        ) -> None:
            if (input_size_per_partition, sum(output_partition_sizes)) != (input_size, output_size):
                raise ValueError("packed folders of compressor are not divided: set tensor_parallel_size=1")
            create(layer, self.members, output_partition_sizes, input_size, params_dtype)

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            finish(layer, self.members)

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.linear(x, layer.get_parameter("weight"), bias)

        def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
            return F.embedding(input_, layer.get_parameter("weight"))

    class CompressorVllmConfig(QuantizationConfig):  # type: ignore[misc]
        """The manifest of a packed folder."""

        def __init__(self, modules: dict[str, Spec]) -> None:
            super().__init__()
            self.modules = modules

        def get_name(self) -> str:
            return MODEL_TYPE

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            if config.get("format_version", 0) > FORMAT_VERSION:
                raise ValueError(f"format_version {config['format_version']}: update compressor")
            return cls(dict(config.get("modules") or {}))

        def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
            refuse_unknown(hf_config)

        def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
            self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            linear = isinstance(layer, LinearBase)
            if linear or isinstance(layer, VocabParallelEmbedding):
                members = members_of(prefix, self.packed_modules_mapping, self.modules)
                if any(member.spec is not None for member in members):
                    return CompressorLinearMethod(members)
                return UnquantizedLinearMethod() if linear else None
            if "experts" in prefix and any(name.startswith(f"{prefix}.") for name in self.modules):
                raise ValueError(f"{prefix} is a {type(layer).__name__} with packed matrices, which is not supported")
            return None

    return CompressorVllmConfig
