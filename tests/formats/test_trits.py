"""Trit planes on disk: exact round trips, layouts from the spec alone, what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.formats import TritPlanes, format_of, nbytes
from compressor.formats.trit_planes import unpack_trit_planes
from compressor.formats.trits import pack_trits, unpack_trits


def planes_of(planes: int, m: int, n: int, group: int, seed: int = 0) -> TritPlanes:
    generator = torch.Generator().manual_seed(seed)
    trits = torch.randint(-1, 2, (planes, m, n), generator=generator).to(torch.int8)
    scale = torch.rand(planes, m, -(-n // group), generator=generator).sort(dim=0, descending=True).values.half()
    return TritPlanes(trits, scale, group)


def slow_values(code: TritPlanes) -> Tensor:
    planes, m, n = code.trits.shape
    value = torch.zeros(m, n)
    for k in range(planes):
        for i in range(m):
            for j in range(n):
                value[i, j] += code.scale[k, i, j // code.group].float() * code.trits[k, i, j]
    return value


@given(st.lists(st.integers(-1, 1), max_size=40))
def test_trits_round_trip(values: list[int]) -> None:
    trits = torch.tensor(values, dtype=torch.int8)
    packed = pack_trits(trits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(values) // 5)
    assert torch.equal(unpack_trits(packed, len(values)), trits)


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 23), st.integers(1, 9), st.integers(0, 99))
def test_planes_round_trip_bit_for_bit(planes: int, m: int, n: int, group: int, seed: int) -> None:
    code = planes_of(planes, m, n, min(group, n), seed)
    assert torch.equal(code.dense(), slow_values(code))
    for dtype in (torch.float32, torch.bfloat16):
        spec, parts = code.spec(dtype), code.parts()
        assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == format_of(spec).layout(spec)
        assert torch.equal(unpack_trit_planes(parts, spec), code.dense(dtype))
        again = TritPlanes.read(parts, spec)
        assert torch.equal(again.trits, code.trits) and torch.equal(again.scale, code.scale)


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_true_bits(planes: int) -> None:
    spec = planes_of(planes, 64, 640, 128).spec(torch.bfloat16)
    assert 8 * nbytes(spec) / (64 * 640) == pytest.approx(planes * (1.6 + 16 / 128))


def test_what_is_no_trit_is_refused() -> None:
    with pytest.raises(ValueError, match="expected -1, 0 or 1"):
        pack_trits(torch.tensor([2], dtype=torch.int8))
    with pytest.raises(ValueError, match="above 242"):
        unpack_trits(torch.tensor([243], dtype=torch.uint8), 5)
    code = planes_of(2, 3, 8, 4)
    parts = code.parts()
    with pytest.raises(ValueError, match="scale"):
        TritPlanes.read({**parts, "scale": parts["scale"].float()}, code.spec(torch.float32))
    with pytest.raises(ValueError, match="scale must be fp16"):
        TritPlanes(code.trits, code.scale.float(), 4).parts()
