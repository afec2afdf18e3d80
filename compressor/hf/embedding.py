"""An embedding that stays packed in memory and unpacks the rows it is asked for, and the output head tied to it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from compressor.formats.parts import Spec, matrix_shape
from compressor.formats.registry import format_of


def pack_embedding(module: nn.Embedding, spec: Spec) -> Any:
    """Return the layer that stands for an embedding once its weight is stored as ``spec`` says.

    Raises:
        ValueError: not an embedding, another shape than the spec's, or a format whose rows are not apart.
    """
    if not isinstance(module, nn.Embedding):
        raise ValueError(f"is a {type(module).__name__}; expected an embedding")
    shape = [module.num_embeddings, module.embedding_dim]
    if shape != list(spec["shape"]):
        raise ValueError(f"is a {shape[0]} x {shape[1]} matrix in the model, but {spec['shape']} in the manifest")
    if spec["format"] != "group-int" or not spec["symmetric"]:
        raise ValueError(f"is stored as {spec['format']}; an embedding can only be symmetric group-int")
    base: Any = type(module)
    made = packed_embedding_class(base)
    packed = made.__new__(made)
    packed.__dict__ = {**module.__dict__, "_parameters": {}, "_buffers": dict(module._buffers)}
    packed.spec = dict(spec)
    packed.compute_dtype = module.weight.dtype
    packed.padding_idx = None  # matters to training alone, and would be looked for among the rows at hand
    packed.rows = None
    for part, (size, dtype) in format_of(spec).layout(spec).items():
        packed.register_buffer(f"weight_{part}", torch.empty(size, dtype=dtype, device=module.weight.device))
    return packed


def is_packed_embedding(module: nn.Module) -> bool:
    """Whether a module was made by `pack_embedding`."""
    return isinstance(module, nn.Embedding) and hasattr(module, "plain")


@cache
def packed_embedding_class(base: Any) -> Any:
    """Return the subclass of a kind of embedding whose ``weight`` is unpacked anew from its parts."""

    class PackedEmbedding(base):  # type: ignore[misc]
        spec: dict[str, Any]
        compute_dtype: torch.dtype
        rows: Tensor | None

        @property
        def parts(self) -> dict[str, Tensor]:
            """The packed tensors by part name."""
            return {part: getattr(self, f"weight_{part}") for part in format_of(self.spec).layout(self.spec)}

        def unpacked(self, ids: Tensor | None = None) -> Tensor:
            """Return the matrix (vocabulary, width), or only its rows ``ids`` (k,)."""
            parts, spec = self.parts, self.spec
            if ids is not None:
                n = matrix_shape(spec)[1]
                spec = {**spec, "shape": [len(ids), n]}
                shape = torch.tensor(spec["shape"])
                parts = {"packed": parts["packed"][ids], "scale": parts["scale"][ids], "shape": shape}
            with torch.no_grad():
                return format_of(spec).unpack(parts, spec).to(self.compute_dtype)

        @property
        def weight(self) -> Tensor:
            """The rows at hand while the base class looks them up; the whole matrix at any other time."""
            weight = self.unpacked() if self.rows is None else self.rows
            weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers must not draw random numbers into it
            return weight

        def forward(self, input: Tensor) -> Tensor:
            """Look up the rows of ``input``, any shape of ids, as the base class does."""
            ids, places = torch.unique(input, return_inverse=True)
            self.rows = self.unpacked(ids)
            try:
                found: Tensor = super().forward(places)
            finally:
                self.rows = None
            return found

        def reset_parameters(self) -> None:
            """Do nothing: packed parts are only ever loaded."""

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            packed = {id(part) for part in self.parts.values()}
            probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.parts["scale"].device))

            def move_only(tensor: Tensor) -> Tensor:
                moved: Tensor = fn(tensor)
                return tensor.to(moved.device) if id(tensor) in packed and moved.dtype != tensor.dtype else moved

            super()._apply(move_only, recurse)
            self.compute_dtype = probe.dtype
            return self

        def plain(self, dtype: torch.dtype | None) -> Any:
            """Return the ordinary embedding with the unpacked weight."""
            embedding: Any = base.__new__(base)
            gone = {"spec", "compute_dtype", "rows"}
            embedding.__dict__ = {key: value for key, value in self.__dict__.items() if key not in gone}
            kept = {name: buffer for name, buffer in self._buffers.items() if not name.startswith("weight_")}
            embedding._buffers, embedding._parameters = kept, {}
            embedding.weight = nn.Parameter(self.unpacked().to(dtype or self.compute_dtype))
            return embedding

    PackedEmbedding.__name__ = PackedEmbedding.__qualname__ = base.__name__
    return PackedEmbedding


class TiedHead(nn.Module):
    """The output head whose matrix is a packed embedding's: it has no tensors of its own but a bias."""

    def __init__(self, embedding: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = head.out_features, head.in_features
        self.bias = head.bias
        self._shared = (embedding,)  # in a tuple, so that it is not found twice among the modules

    def shares(self, embedding: nn.Module) -> bool:
        """Whether this is the embedding that it uses."""
        return self._shared[0] is embedding

    def plain(self, embedding: nn.Embedding) -> nn.Linear:
        """Return the ordinary head tied to an ordinary embedding."""
        head = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        head.weight, head.bias = embedding.weight, self.bias
        return head

    @property
    def weight(self) -> Tensor:
        """The embedding's matrix (vocabulary, width), unpacked anew."""
        weight: Tensor = self._shared[0].unpacked()  # type: ignore[operator]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., vocabulary)."""
        return F.linear(x, self.weight, self.bias)
