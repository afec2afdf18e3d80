"""Products of two factors, and codes with such a product added: exact on disk, and refused where they do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.formats import GroupInt, LowRank, Sum, TritPlanes, format_of, nbytes, pack, unpack
from compressor.formats.dense import Dense
from compressor.formats.group_int import portable_scale
from compressor.formats.leaf import LEAVES, Leaf

quick = settings(max_examples=60, deadline=None)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(m: int, n: int, bits: int, seed: int = 0) -> GroupInt:
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (m, n), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    return GroupInt(codes, portable_scale(0.01 * normal(m, 1, seed=seed), bits), None, bits)


def product(m: int, r: int, n: int, bits: int = 16, seed: int = 0) -> LowRank:
    if bits == 16:
        return LowRank(Dense(normal(m, r, seed=seed).half()), Dense(normal(r, n, seed=seed + 1).half()))
    return LowRank(integers(m, r, bits, seed), integers(r, n, bits, seed + 1))


def base_of(kind: str, m: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Leaf:
    if kind == "dense":
        return Dense(normal(m, n, seed=seed).to(dtype))
    if kind == "integers":
        return integers(m, n, 3, seed)
    trits = torch.randint(-1, 2, (2, m, n), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    return TritPlanes(trits, normal(2, m, -(-n // 7), seed=seed).abs().half(), min(7, n))


shapes = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 40))


@given(shapes, st.sampled_from([16, 8, 4]), st.sampled_from(DTYPES), st.integers(0, 1000))
@quick
def test_products_come_back_bit_for_bit(shape: tuple[int, int, int], bits: int, dtype: torch.dtype, seed: int) -> None:
    value = product(*shape, bits=bits, seed=seed)
    spec, parts = pack(value, dtype)
    assert sum(part.numel() * part.itemsize for part in parts.values()) == nbytes(spec)
    again = unpack(spec, parts)
    assert isinstance(again, LowRank)
    assert torch.equal(again.dense(dtype), value.dense(dtype))
    assert torch.equal(format_of(spec).unpack(parts, spec), value.dense(dtype))
    exact = value.left.dense(torch.float64) @ value.right.dense(torch.float64)
    torch.testing.assert_close(value.dense(torch.float32), exact.float(), rtol=1e-6, atol=1e-9)


@given(shapes, st.sampled_from(["dense", "integers", "trits"]), st.sampled_from([16, 4]), st.sampled_from(DTYPES))
@quick
def test_sums_come_back_bit_for_bit(shape: tuple[int, int, int], kind: str, bits: int, dtype: torch.dtype) -> None:
    m, _, n = shape
    kind = kind if n >= 7 or kind == "dense" else "integers"
    value = Sum(base_of(kind, m, n, dtype), product(*shape, bits=bits))
    spec, parts = pack(value, dtype)
    assert sum(part.numel() * part.itemsize for part in parts.values()) == nbytes(spec)
    assert torch.equal(format_of(spec).unpack(parts, spec), value.dense(dtype))
    again = unpack(spec, parts)
    assert isinstance(again, Sum) and torch.equal(again.dense(), value.dense())
    assert type(again.base) is type(value.base) is LEAVES[spec["base"]["format"]][0]
    before = value.base.dense(torch.float32).clone()
    assert torch.equal(value.dense(), before + value.correction.dense())
    assert torch.equal(value.base.dense(torch.float32), before)  # a dense base is not written to


def test_the_product_is_the_same_on_any_number_of_threads() -> None:
    before, value, found = torch.get_num_threads(), product(300, 37, 500), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(value.dense())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_dense_base_is_one_tensor_in_the_dtype_of_the_matrix() -> None:
    spec, parts = pack(Sum(base_of("dense", 4, 12), product(4, 2, 12)), torch.bfloat16)
    assert spec["base"] == {"format": "dense", "shape": [4, 12], "dtype": "bfloat16"}
    assert parts["base_weight"].dtype == torch.bfloat16 and parts["correction_left_weight"].dtype == torch.float16
    with pytest.raises(ValueError, match="part 'weight' is"):
        unpack(spec, parts | {"base_weight": torch.zeros(4, 12)})


def spec_and_parts() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return pack(Sum(base_of("integers", 4, 12), product(4, 2, 12)), torch.float32)


@pytest.mark.parametrize("part", ["base_packed", "correction_left_weight", "correction_right_weight"])
def test_a_missing_part_is_named(part: str) -> None:
    spec, parts = spec_and_parts()
    del parts[part]
    with pytest.raises(ValueError, match=part.rpartition("_")[2]):
        unpack(spec, parts)


def test_parts_and_terms_that_do_not_belong_are_refused() -> None:
    spec, parts = spec_and_parts()
    with pytest.raises(ValueError, match="unexpected part 'other'"):
        unpack(spec, parts | {"other": torch.zeros(1)})
    with pytest.raises(ValueError, match="terms"):
        unpack(spec | {"shape": [5, 12]}, parts)
    with pytest.raises(ValueError, match="expected a code or dense, and low-rank"):
        unpack(spec | {"base": spec["correction"]}, parts)
    crossed = spec["correction"] | {"left": spec["correction"]["right"]}
    with pytest.raises(ValueError, match="factors"):
        nbytes(spec | {"correction": crossed})
    with pytest.raises(ValueError, match="inside another"):
        odd = spec["correction"]["left"] | {"format": "bitmask"}
        nbytes(spec | {"correction": spec["correction"] | {"left": odd}})
