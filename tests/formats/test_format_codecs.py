"""Every format gives back exactly what went in, in exactly the bytes its layout promises."""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.formats import FORMATS, Dense, Masked, SparseInt, choose, format_of, nbytes, pack, tensor_name, unpack
from compressor.formats import nm as nm_file
from compressor.formats.bitmask import pack_bitmask
from compressor.formats.bits import pack_bits, pack_codes, unpack_bits, unpack_codes
from compressor.formats.nm import nm_word, pack_nm, unpack_nm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
quick = settings(max_examples=60, deadline=None)


def bits_of(tensor: Tensor) -> Tensor:
    """Return the bit patterns of a float tensor: equality that tells -0 from 0 and holds for NaN."""
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(bits_of(found), bits_of(expected))


def any_bits(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Return a matrix of arbitrary bit patterns: infinities, NaNs, denormals and both zeros included."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(width)
    raw = torch.randint(info.min, info.max, shape, generator=generator, dtype=width)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")]).to(dtype)
    matrix = raw.view(dtype)
    where = torch.rand(shape, generator=generator) < 0.2
    return torch.where(where, special[torch.randint(0, 5, shape, generator=generator)], matrix)


def assert_layout(spec: dict[str, Any], parts: dict[str, Tensor]) -> None:
    layout = FORMATS[spec["format"]].layout(spec)
    assert {part: (tuple(t.shape), t.dtype) for part, t in parts.items()} == layout
    assert nbytes(spec) == sum(t.nbytes for t in parts.values())


@given(
    st.integers(1, 9), st.integers(1, 40), st.sampled_from(DTYPES), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.integers(0, 10**6),
)  # fmt: skip
@quick
def test_bitmask_is_bit_exact(rows: int, columns: int, dtype: torch.dtype, density: float, seed: int) -> None:
    weight = any_bits((rows, columns), dtype, seed)
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    parts = pack_bitmask(weight, mask)
    name = str(dtype).removeprefix("torch.")
    spec = {"format": "bitmask", "shape": [rows, columns], "dtype": name, "nnz": int(mask.sum())}
    assert_layout(spec, parts)
    assert_same_bits(FORMATS["bitmask"].unpack(parts, spec), weight.masked_fill(~mask, 0))
    back = unpack(spec, parts)
    assert isinstance(back, Masked) and torch.equal(back.mask, mask)  # a kept zero stays kept


@given(st.integers(0, 70), st.integers(0, 10**6))
@quick
def test_bits_are_little_endian_and_padded_at_the_end(count: int, seed: int) -> None:
    flags = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    expected = [0] * -(-count // 8)
    for i, flag in enumerate(flags.tolist()):
        expected[i // 8] |= flag << (i % 8)
    assert pack_bits(flags).tolist() == expected
    assert torch.equal(unpack_bits(pack_bits(flags), count), flags)


@given(st.integers(0, 70), st.integers(1, 8), st.integers(0, 10**6))
@quick
def test_codes_are_one_gapless_stream(count: int, bits: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    stream = sum(code << (bits * i) for i, code in enumerate(codes.tolist()))
    packed = pack_codes(codes, bits)
    assert packed.tolist() == list(stream.to_bytes(-(-count * bits // 8), "little"))
    assert torch.equal(unpack_codes(packed, bits, count), codes)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    flags = torch.rand(1001, generator=generator) < 0.5
    codes = torch.randint(0, 8, (1001,), generator=generator, dtype=torch.uint8)
    weight, mask = nm_matrix(6, 96, 2, 4, generator, at_most=True)
    whole = pack_bits(flags), pack_codes(codes, 3), pack_nm(weight, mask, 2, 4)
    monkeypatch.setattr("compressor.formats.bits.CHUNK", 64)
    monkeypatch.setattr(nm_file, "NM_CHUNK", 5)
    assert torch.equal(pack_bits(flags), whole[0]) and torch.equal(pack_codes(codes, 3), whole[1])
    assert torch.equal(unpack_codes(whole[1], 3, 1001), codes)
    assert torch.equal(pack_nm(weight, mask, 2, 4)["index"], whole[2]["index"])
    spec = {"format": "nm", "shape": [6, 96], "dtype": "float32", "n": 2, "m": 4}
    assert torch.equal(unpack_nm(whole[2], spec), weight)


def nm_matrix(
    rows: int, columns: int, n: int, m: int, generator: torch.Generator, at_most: bool
) -> tuple[Tensor, Tensor]:
    """Return (weight, mask) with n kept of every m, or at most n."""
    order = torch.rand(rows, columns // m, m, generator=generator).argsort(-1)
    mask = order < n
    if at_most:
        mask &= torch.rand(mask.shape, generator=generator) < 0.7
    mask = mask.view(rows, columns)
    return torch.randn(rows, columns, generator=generator).masked_fill(~mask, 0), mask


@given(st.data(), st.integers(1, 5), st.integers(1, 12), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 10**6))
@quick
def test_nm_is_bit_exact(
    data: st.DataObject, rows: int, groups: int, dtype: torch.dtype, at_most: bool, seed: int
) -> None:
    m = data.draw(st.integers(1, 32))
    n = data.draw(st.integers(1, m))
    _, mask = nm_matrix(rows, groups * m, n, m, torch.Generator().manual_seed(seed), at_most)
    weight = any_bits((rows, groups * m), dtype, seed)
    parts = pack_nm(weight, mask, n, m)
    name = str(dtype).removeprefix("torch.")
    spec = {"format": "nm", "shape": [rows, groups * m], "dtype": name, "n": n, "m": m}
    assert_layout(spec, parts)
    assert_same_bits(unpack_nm(parts, spec), weight.masked_fill(~mask, 0))
    back = unpack(spec, parts)
    assert isinstance(back, Masked) and back.pattern == (n, m)
    assert torch.equal(back.mask & mask, mask) and bool((back.mask.view(-1, m).sum(1) == n).all())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 7), (5, 5), (2, 32)])
def test_nm_index_is_the_rank_in_colexicographic_order(n: int, m: int) -> None:
    subsets = sorted(combinations(range(m), n), key=lambda subset: subset[::-1])
    mask = torch.zeros(len(subsets), m, dtype=torch.bool)
    for row, subset in enumerate(subsets):
        mask[row, list(subset)] = True
    index = pack_nm(torch.ones(mask.shape), mask, n, m)["index"].tolist()
    width, per_word = nm_word(n, m)
    if n == m:
        assert index == []
        return
    ranks = []
    for start in range(0, len(index), width):
        word = int.from_bytes(bytes(index[start : start + width]), "little")
        for _ in range(per_word):
            word, rank = divmod(word, comb(m, n))
            ranks.append(rank)
    assert ranks[: len(subsets)] == list(range(len(subsets)))


def test_nm_words_fit_and_are_the_shortest() -> None:
    assert nm_word(2, 4) == (1, 3) and nm_word(4, 8) == (7, 9) and nm_word(4, 4) == (0, 1)
    for m in range(2, 33):
        for n in range(1, m):
            width, ranks = nm_word(n, m)
            assert comb(m, n) ** ranks <= 2 ** min(8 * width, 63)
            for other in range(1, 9):  # no width holds more ranks a byte
                more = ranks * other // width + 1
                assert comb(m, n) ** more > 2 ** min(8 * other, 63)


def test_nm_fills_up_the_lowest_free_positions_with_zeros() -> None:
    weight = torch.tensor([[5.0, 6.0, 7.0, 8.0, 0.0, 0.0, 0.0, 9.0]])
    mask = torch.tensor([[False, False, True, False, False, False, False, True]])
    parts = pack_nm(weight, mask, 2, 4)
    assert parts["values"].tolist() == [[0.0, 7.0, 0.0, 9.0]]
    back = unpack({"format": "nm", "shape": [1, 8], "dtype": "float32", "n": 2, "m": 4}, parts)
    assert isinstance(back, Masked)
    assert back.mask.int().tolist() == [[1, 0, 1, 0, 1, 0, 0, 1]]


def test_nm_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"3 entries are kept from \(1, 4\) on, where 2:4 allows 2"):
        mask = torch.zeros(2, 8, dtype=torch.bool)
        mask[1, 4:7] = True
        pack_nm(torch.ones(2, 8), mask, 2, 4)
    with pytest.raises(ValueError, match="2:4 does not divide 6 columns"):
        pack_nm(torch.ones(2, 6), torch.zeros(2, 6, dtype=torch.bool), 2, 4)
    with pytest.raises(ValueError, match="0 < N <= M <= 32"):
        pack_nm(torch.ones(2, 66), torch.zeros(2, 66, dtype=torch.bool), 2, 33)


@given(
    st.integers(1, 6), st.integers(1, 40), st.integers(2, 8), st.sampled_from(DTYPES), st.floats(0, 1),
    st.integers(0, 10**6),
)  # fmt: skip
@quick
def test_sparse_int_is_exact(rows: int, columns: int, bits: int, dtype: torch.dtype, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    mask = torch.rand(rows, columns, generator=generator) < density
    scale = torch.rand(rows, generator=generator).half()
    zero = torch.randint(0, 2**bits, (rows,), generator=generator, dtype=torch.uint8)
    spec, parts = pack(SparseInt(codes, scale, zero, mask, bits), dtype)
    assert_layout(spec, parts)
    expected = torch.zeros(rows, columns, dtype=dtype)
    for i in range(rows):
        for j in range(columns):
            if mask[i, j]:
                expected[i, j] = (float(codes[i, j]) - float(zero[i])) * scale[i].float()
    assert_same_bits(FORMATS["sparse-int"].unpack(parts, spec), expected)
    back = unpack(spec, parts)
    assert isinstance(back, SparseInt) and torch.equal(back.codes, codes.masked_fill(~mask, 0))
    assert torch.equal(back.mask, mask) and torch.equal(back.dense(dtype), expected)


@pytest.mark.parametrize("name", ["dense", "bitmask", "nm", "sparse-int"])
def test_damaged_parts_are_named(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, mask = nm_matrix(3, 40, 2, 4, generator, at_most=False)
    codes, half = torch.ones(3, 40, dtype=torch.uint8), torch.ones(3).half()
    packed: dict[str, Any] = {
        "dense": Dense(weight),
        "bitmask": Masked(weight, mask),
        "nm": Masked(weight, mask, (2, 4)),
        "sparse-int": SparseInt(codes, half, torch.zeros(3, dtype=torch.uint8), mask, 3),
    }
    spec, parts = pack(packed[name], torch.float32)
    assert spec["format"] == name
    read = format_of(spec).unpack
    for part, tensor in parts.items():
        with pytest.raises(ValueError, match=f"{name}: part '{part}' is missing"):
            read({key: value for key, value in parts.items() if key != part}, spec)
        with pytest.raises(ValueError, match=f"{name}: part '{part}' is .* expected"):
            read({**parts, part: tensor[:-1]}, spec)
        with pytest.raises(ValueError, match=f"{name}: part '{part}' is .* expected"):
            read({**parts, part: tensor.to(torch.int32)}, spec)
    with pytest.raises(ValueError, match="unexpected part 'more'"):
        read({**parts, "more": weight}, spec)
    if "mask" in parts:
        with pytest.raises(ValueError, match="part 'mask' keeps 120 entries, expected 60"):
            read({**parts, "mask": torch.full_like(parts["mask"], 255)}, spec)
    if "index" in parts:
        with pytest.raises(ValueError, match="part 'index' holds a word that is no 3 ranks of 2:4"):
            read({**parts, "index": torch.full_like(parts["index"], 255)}, spec)


def test_unknown_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown format 'zip'"):
        nbytes({"format": "zip"})
    with pytest.raises(ValueError, match="dtype 'int8' of a packed matrix"):
        nbytes({"format": "dense", "shape": [2, 2], "dtype": "int8"})
    with pytest.raises(ValueError, match="cannot pack a weight of dtype int8"):
        pack(Dense(torch.zeros(2, 2)), torch.int8)
    with pytest.raises(ValueError, match=r"shape \[2\] of a packed matrix"):
        nbytes({"format": "dense", "shape": [2], "dtype": "float32"})


def test_choose_takes_the_fewest_bytes() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, mask = nm_matrix(64, 64, 2, 4, generator, at_most=False)
    assert choose(weight, mask)["format"] == "bitmask"
    assert choose(weight, mask, (2, 4), torch.bfloat16) == {
        "format": "nm", "shape": [64, 64], "dtype": "bfloat16", "n": 2, "m": 4,
    }  # fmt: skip
    assert choose(weight, torch.ones_like(mask))["format"] == "dense"
    assert choose(weight, torch.zeros_like(mask), (2, 4))["format"] == "bitmask"  # nothing left: half of it is too much
    options = [Dense(weight), Masked(weight, mask), Masked(weight, mask, (2, 4))]
    sizes = [nbytes(option.spec(torch.float16)) for option in options]
    assert sizes == [8192, 4096 + 512, 4096 + 342]


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_rounds_once_and_clears_what_is_not_kept(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 16, generator=generator)
    for density in (0.5, 1.0):  # packed and dense
        mask = torch.rand(16, 16, generator=generator) < density
        mask[0, 0] = False
        spec, parts = pack(Masked(weight, mask), dtype)
        assert_same_bits(format_of(spec).unpack(parts, spec), weight.to(dtype).masked_fill(~mask, 0))


def test_layouts_need_no_weights_and_names_are_as_documented() -> None:
    spec = {"format": "bitmask", "shape": [3, 3], "dtype": "float16", "nnz": 4}
    assert FORMATS["bitmask"].layout(spec) == {"mask": ((2,), torch.uint8), "values": ((4,), torch.float16)}
    meta = {part: torch.empty(s, dtype=d, device="meta") for part, (s, d) in FORMATS["bitmask"].layout(spec).items()}
    assert sum(t.nbytes for t in meta.values()) == nbytes(spec) == 10
    assert tensor_name("a.b", "mask") == "a.b.weight_mask" and tensor_name("a.b", "weight") == "a.b.weight"
