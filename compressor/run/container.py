"""Which kind of folder can hold a result, and its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from compressor.engine.skeleton import Skeleton
from compressor.errors import UserError
from compressor.hf.compressed_tensors import QUANT_METHOD, quantization_config
from compressor.hf.linearized import linear_layers
from compressor.hf.reader import packed_config, source_config

Container = Literal["plain", "compressed-tensors", "compressor"]

LOADS_WITH: dict[Container, tuple[str, ...]] = {
    "plain": ("transformers and every other runtime that reads this architecture",),
    "compressed-tensors": ("transformers with the compressed-tensors package", "vLLM"),
    "compressor": ("transformers after 'import compressor'", "transformers with trust_remote_code=True"),
}


def container_of(skeleton: Skeleton, specs: Mapping[str, Mapping[str, Any]]) -> Container:
    """The most widely read kind of folder that can say what ``specs`` (linear name -> manifest entry) say."""
    if linear_layers(skeleton.checkpoint.config):
        return "compressor"
    if not specs:
        return "plain"
    ordinary = {linear.name for linear in skeleton.linears if not linear.transposed}  # as its readers know them
    if any(spec["format"] != "group-int" or not spec["symmetric"] for spec in specs.values()) or set(specs) - ordinary:
        return "compressor"
    try:
        quantization_config(specs, _left_out(skeleton, specs))
    except UserError:  # experts that its readers would mix up
        return "compressor"
    return "compressed-tensors"


def folder_config(skeleton: Skeleton, specs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of config.json for a folder with these packed linears."""
    plain = source_config(skeleton.checkpoint.config)
    kind = container_of(skeleton, specs)
    if kind == "plain":
        return plain
    if kind == QUANT_METHOD:
        return {**plain, "quantization_config": quantization_config(specs, _left_out(skeleton, specs))}
    return packed_config(plain, dict(specs))


def _left_out(skeleton: Skeleton, specs: Mapping[str, Any]) -> list[str]:
    """All linear layers that stay dense, the head among them."""
    return [name for name in skeleton.all_linears() if name not in specs]
