"""As much of vLLM 0.33 as its loading of weights needs, with the signatures of its own classes.

Written from vllm 0.33.0: model_executor/layers/linear.py, vocab_parallel_embedding.py, quantization/base_config.py and
models/utils.py, where WeightsMapper puts ``shard_id`` on a tensor and AutoWeightsLoader calls ``weight_loader(param,
tensor)``.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

REGISTERED: dict[str, Any] = {}


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None: ...

    @abstractmethod
    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor: ...

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        layer.weight = embed_tokens.weight
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


class LinearMethodBase(QuantizeMethodBase):
    @abstractmethod
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None: ...

    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor: ...


class Unquantized(LinearMethodBase):
    """Of linear layers and embeddings alike."""

    def create_weights(  # type: ignore[no-untyped-def]
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra
    ) -> None:
        weight = nn.Parameter(
            torch.zeros(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype), requires_grad=False
        )

        def load(param: Tensor, loaded: Tensor) -> None:
            shard = getattr(loaded, "shard_id", 0)
            start = sum(output_partition_sizes[: "qkv".index(shard) if isinstance(shard, str) else shard])
            param.data[start : start + len(loaded)].copy_(loaded)

        weight.weight_loader = load  # type: ignore[attr-defined]
        layer.register_parameter("weight", weight)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.get_parameter("weight"), bias)


class QuantizationConfig(ABC):
    def __init__(self) -> None:
        super().__init__()
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Any: ...

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any: ...


class LinearBase(nn.Module):
    """A layer of one or several matrices with the same input."""

    def __init__(
        self, config: Any, prefix: str, sizes: Sequence[int], width: int, *, bias: bool, ranks: int = 1
    ) -> None:
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix)
        assert self.quant_method is not None, "All linear layers should support quant method."
        self.bias = nn.Parameter(torch.zeros(sum(sizes)), requires_grad=False) if bias else None
        parts = [size // ranks for size in sizes]
        self.quant_method.create_weights(
            self, width, parts, width, sum(sizes), torch.get_default_dtype(), weight_loader=None
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, self.bias)  # type: ignore[no-any-return]


class VocabParallelEmbedding(nn.Module):
    """An embedding whose rows are filled up to a multiple of 64, or a head."""

    def __init__(self, config: Any, prefix: str, rows: int, width: int) -> None:
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix) or Unquantized()
        padded = -(-rows // 64) * 64
        self.quant_method.create_weights(
            self, width, [padded], width, padded, torch.get_default_dtype(), weight_loader=None
        )


def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]], stacked: dict[str, tuple[str, Any]]) -> None:
    """As AutoWeightsLoader with a mapper of stacked names, and then the processing of every layer."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in weights:
        for old, (new, shard) in stacked.items():
            if old in name:
                name, tensor.shard_id = name.replace(old, new), shard  # type: ignore[attr-defined]
        parameters[name].weight_loader(parameters[name], tensor)  # type: ignore[attr-defined]
    for module in model.modules():
        if isinstance(getattr(module, "quant_method", None), QuantizeMethodBase):
            module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr,operator]


def register_quantization_config(quantization: str) -> Any:
    def wrap(cls: Any) -> Any:
        assert issubclass(cls, QuantizationConfig)
        REGISTERED[quantization] = cls
        return cls

    return wrap


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put this in the place of vLLM, for one test."""
    layers = "vllm.model_executor.layers"
    content: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": Unquantized,
        },
        f"{layers}.quantization": {"register_quantization_config": register_quantization_config},
        f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        f"{layers}.vocab_parallel_embedding": {"VocabParallelEmbedding": VocabParallelEmbedding},
    }
    for name, members in content.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
