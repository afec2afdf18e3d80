"""The packed layer behaves as an ``nn.Linear`` with the same zeros."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers.pytorch_utils import Conv1D

from compressor.formats import Masked, SparseInt, pack
from compressor.hf.linear import PackedLinear, replacement


def packed_layer(dtype: torch.dtype = torch.bfloat16, quantized: bool = False) -> tuple[PackedLinear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 16, generator=generator) < 0.5
    if quantized:
        codes = torch.randint(0, 8, (6, 16), generator=generator, dtype=torch.uint8)
        scale, zero = torch.rand(6, generator=generator).half(), torch.full((6,), 3, dtype=torch.uint8)
        spec, parts = pack(SparseInt(codes, scale, zero, mask, 3), dtype)
        dense = SparseInt(codes, scale, zero, mask, 3).dense(dtype)
    else:
        weight = torch.randn(6, 16, generator=generator)
        spec, parts = pack(Masked(weight, mask), dtype)
        dense = weight.to(dtype).masked_fill(~mask, 0)
    layer = PackedLinear(spec, bias=True, dtype=dtype)
    for part, tensor in parts.items():
        layer.register_buffer(f"weight_{part}", tensor)
    nn.init.ones_(layer.bias)
    return layer, dense


@pytest.mark.parametrize("quantized", [False, True])
def test_weight_and_forward(quantized: bool) -> None:
    layer, dense = packed_layer(quantized=quantized)
    assert isinstance(layer, nn.Linear) and torch.equal(layer.weight, dense)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(layer(x), F.linear(x, dense, layer.bias))
    assert "weight" not in dict(layer.named_parameters()) and "format=" in repr(layer)
    layer.check()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("quantized", [False, True])
def test_to_changes_what_is_computed_and_not_what_is_held(quantized: bool) -> None:
    layer, dense = packed_layer(quantized=quantized)
    held = {part: tensor.dtype for part, tensor in layer.parts.items()}
    layer.float()
    assert {part: tensor.dtype for part, tensor in layer.parts.items()} == held
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.weight, dense.float()) and layer.weight.dtype == torch.float32
    layer.to(torch.float16)
    assert torch.equal(layer.weight, dense.half())
    layer.to("meta")
    assert all(tensor.is_meta for tensor in layer.parts.values())
    layer.to_empty(device="cpu")
    assert {part: tensor.dtype for part, tensor in layer.parts.items()} == held


def test_gradients_pass_and_the_state_dict_is_packed() -> None:
    layer, dense = packed_layer(torch.float32)
    x = torch.ones(2, 16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.bias.grad is not None
    torch.testing.assert_close(x.grad[0], dense.sum(0))
    assert set(layer.state_dict()) == {"bias", "weight_mask", "weight_values"}
    other = PackedLinear(layer.spec, bias=True, dtype=torch.float32)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, dense)


def test_writing_the_weight_is_an_error() -> None:
    layer, dense = packed_layer(torch.float32)
    assert type(layer.weight + 1) is torch.Tensor and torch.equal(layer.weight.data, dense)
    with pytest.raises(RuntimeError, match=r"call model.dequantize\(\) first"):
        layer.weight.data += 1
    with pytest.raises(RuntimeError, match=r"call model.dequantize\(\) first"):
        layer.weight.data = dense
    with pytest.raises(KeyError, match="weight"):
        layer.weight = nn.Parameter(dense)


def test_replacement_fits_the_module_it_replaces() -> None:
    spec = {"format": "bitmask", "shape": [6, 16], "dtype": "float32", "nnz": 3}
    with torch.device("meta"):
        linear, conv = nn.Linear(16, 6, bias=False, dtype=torch.float16), Conv1D(6, 16)
    made = replacement(linear, spec)
    assert isinstance(made, PackedLinear) and made.bias is None and made.compute_dtype == torch.float16
    assert all(tensor.is_meta for tensor in made.parts.values())
    turned = replacement(conv, spec)
    assert isinstance(turned, PackedLinear) and turned.bias.shape == (6,)
    dense = replacement(conv, {"format": "dense", "shape": [6, 16], "dtype": "float32"})
    assert type(dense) is nn.Linear and dense.weight.shape == (6, 16) and dense.weight.is_meta
    with pytest.raises(ValueError, match=r"is a 16 x 6 matrix in the model, but \[6, 16\] in the manifest"):
        replacement(nn.Linear(6, 16, device="meta"), spec)
    with pytest.raises(ValueError, match="is a Embedding; expected a linear layer"):
        replacement(nn.Embedding(6, 16, device="meta"), spec)
