"""A model that is laid out a second time: what the first layout alone held is not lost with it."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import numbers
from torch import nn

from compressor.formats.group_int import GroupInt
from compressor.formats.representation import Representation, pack
from compressor.formats.trit_planes import TritPlanes
from compressor.hf.fast import accelerate
from compressor.hf.linear import PackedLinear
from compressor.kernels.native import Native


def trits(m: int, n: int) -> TritPlanes:
    entries = torch.randint(-1, 2, (2, m, n), generator=numbers(1, m, n)).to(torch.int8)
    scale = torch.rand(2, m, n // 128, generator=numbers(2, m, n)).sort(0, descending=True)[0].half()
    return TritPlanes(entries, scale, 128)


def ints(m: int, n: int) -> GroupInt:
    codes = torch.randint(-8, 8, (m, n), generator=numbers(3, m, n)).to(torch.int8)
    scale = torch.rand(m, n // 128, generator=numbers(4, m, n)).bfloat16().float()
    return GroupInt(codes, scale, None, 4)


def layer(matrix: Representation) -> PackedLinear:
    spec, parts = pack(matrix, torch.float32)
    made = PackedLinear(spec, bias=False, dtype=torch.float32)
    for name, part in parts.items():
        setattr(made, f"weight_{name}", part.clone())
    return made


@pytest.mark.parametrize("second", ["portable", "torch", "dense", "packed"])
def test_nothing_is_lost(second: str, kernels: Native) -> None:
    """Also where layers that share their input share their memory, as these do."""
    block = nn.Module()
    for name, matrix in (("q_proj", trits(48, 256)), ("k_proj", trits(16, 256)), ("v_proj", trits(16, 256)),
                         ("o_proj", ints(48, 256))):  # fmt: skip
        block.add_module(name, layer(matrix))
    layers = [child for child in block.children() if isinstance(child, PackedLinear)]
    stored = [{name: part.clone() for name, part in one.parts.items()} for one in layers]
    x = torch.randn(3, 256, generator=numbers(5, 3, 256))
    assert accelerate(block, "portable").joined == 3
    assert all(one.released for one in layers)  # else there would be nothing to lose
    first = [one(x) for one in layers]
    for way in (second, "portable"):
        accelerate(block, way)
        for one, want in zip(layers, stored, strict=True):
            found = one.parts
            assert found.keys() == want.keys()
            assert all(torch.equal(found[name], part) for name, part in want.items()), way
    assert all(torch.equal(one(x), want) for one, want in zip(layers, first, strict=True))
