"""Partial binarization on disk: exact round trips of masks and matrices, sizes from the spec, what is refused."""

from __future__ import annotations

from math import comb, log2
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.formats import PartialBinary, format_of, nbytes, pack, unpack
from compressor.formats.mask_codes import MASK_CHUNK, cheapest_mask, foreseen_mask, mask_nbytes, pack_mask, unpack_mask
from compressor.formats.partial_binary import unpack_partial_binary


def random_mask(m: int, n: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < share


def code_of(
    m: int,
    n: int,
    *,
    group: int = 4,
    bits: int = 8,
    share: float = 0.2,
    mean: bool = True,
    zero: bool = False,
    by_input: bool = False,
    seed: int = 0,
) -> PartialBinary:
    generator = torch.Generator().manual_seed(seed)
    salient = random_mask(1 if by_input else m, n, share, seed).expand(m, n).contiguous()
    groups = (m, -(-n // group))
    codes = torch.randint(0, 2**bits, (m, n), generator=generator).to(torch.uint8)
    step = torch.randn((1, n) if by_input else (m, 1), generator=generator).half()
    return PartialBinary(
        signs=torch.rand(m, n, generator=generator).gt(0.5) & ~salient,
        scale=torch.rand(groups, generator=generator).half(),
        mean=torch.randn(groups, generator=generator).half() if mean else None,
        salient=salient,
        codes=codes.masked_fill(~salient, 0),
        step=step.masked_fill(~salient.any(0), 0) if by_input else step,
        zero=torch.randint(0, 2**bits, (m,), generator=generator).to(torch.uint8) if zero else None,
        bits=bits,
        group=group,
    )


def slow_values(code: PartialBinary) -> Tensor:
    m, n = code.signs.shape
    value = torch.empty(m, n)
    for i in range(m):
        for j in range(n):
            if code.salient[i, j]:
                zero = 2 ** (code.bits - 1) if code.zero is None else int(code.zero[i])
                step = code.step[0, j] if code.by_input else code.step[i, 0]
                value[i, j] = (int(code.codes[i, j]) - zero) * step.float()
            else:
                scale = code.scale[i, j // code.group].float()
                value[i, j] = scale if code.signs[i, j] else -scale
                if code.mean is not None:
                    value[i, j] += code.mean[i, j // code.group].float()
    return value


def slow_mask_bits(mask: Tensor, rice: int) -> list[bool]:
    """The three streams by rows, bit by bit, as the head of `mask_codes` has it."""
    flat = mask.flatten().tolist()
    flat += [False] * (-len(flat) % MASK_CHUNK)
    chunks = [flat[start : start + MASK_CHUNK] for start in range(0, len(flat), MASK_CHUNK)]
    streams: list[list[bool]] = [[], [], []]
    for chunk in chunks:
        places = [p for p, marked in enumerate(chunk) if marked]
        k = len(places)
        streams[0] += [bool(k >> b & 1) for b in range(rice)]
        streams[1] += [False] * (k >> rice) + [True]
        rank = sum(comb(p, i) for i, p in enumerate(places, 1))
        streams[2] += [bool(rank >> b & 1) for b in range((comb(MASK_CHUNK, k) - 1).bit_length())]
    return [bit for stream in streams for bit in (*stream, *[False] * (-len(stream) % 8))]


shares = st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.5, 0.95, 1.0])


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), shares, st.integers(0, 99))
def test_masks_round_trip_in_the_cheapest_code(m: int, n: int, share: float, seed: int) -> None:
    mask = random_mask(m, n, share, seed)
    fields = cheapest_mask(mask)
    packed = pack_mask(mask, fields)
    assert packed.dtype == torch.uint8 and packed.numel() == mask_nbytes(m, n, fields) <= -(-m * n // 8)
    assert torch.equal(unpack_mask(packed, {**fields, "shape": [m, n]}), mask)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), shares, st.integers(0, 6), st.sampled_from(["rows", "columns"]))
def test_ranks_are_those_of_the_definition(m: int, n: int, share: float, rice: int, code: str) -> None:
    mask = random_mask(m, n, share)
    fields = {"nnz": int(mask.sum()), "mask": code, "rice": rice}
    packed = pack_mask(mask, fields)
    expected = slow_mask_bits(mask if code == "rows" else mask.T, rice)
    assert [bool(byte >> b & 1) for byte in packed.tolist() for b in range(8)] == expected
    assert torch.equal(unpack_mask(packed, {**fields, "shape": [m, n]}), mask)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_masks_cost_little_more_than_their_entropy(share: float) -> None:
    mask = random_mask(256, 512, share)
    p = float(mask.float().mean())
    entropy = -p * log2(p) - (1 - p) * log2(1 - p)
    bits = 8 * mask_nbytes(256, 512, cheapest_mask(mask)) / mask.numel()
    assert entropy - 0.002 < bits < entropy + 0.04
    foreseen = mask_nbytes(256, 512, foreseen_mask(256, 512, int(mask.sum())))
    assert 8 * foreseen / mask.numel() == pytest.approx(bits, rel=0.02)


def test_whole_inputs_take_a_bit_each_and_dense_masks_a_bitmap() -> None:
    inputs = random_mask(1, 100, 0.2).expand(40, 100)
    assert mask_nbytes(40, 100, cheapest_mask(inputs)) == 13
    assert cheapest_mask(random_mask(64, 64, 0.5))["mask"] == "bitmap"
    assert cheapest_mask(torch.zeros(3, 5, dtype=torch.bool)) == {"nnz": 0, "mask": "none"}
    assert cheapest_mask(torch.ones(3, 5, dtype=torch.bool)) == {"nnz": 15, "mask": "all"}


@settings(deadline=None)
@given(st.binary(min_size=60, max_size=60), st.integers(0, 6))
def test_any_bytes_are_a_mask_or_refused(noise: bytes, rice: int) -> None:
    spec = {"nnz": 50, "mask": "rows", "rice": rice, "mask_bytes": 60, "shape": [20, 25]}
    try:
        mask = unpack_mask(torch.tensor(list(noise), dtype=torch.uint8), spec)
    except ValueError as error:
        assert "part 'mask'" in str(error)
    else:
        assert int(mask.sum()) == 50


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 7))
def test_a_flipped_bit_is_another_mask_or_refused(byte: int, bit: int) -> None:
    mask = random_mask(20, 50, 0.1)
    fields = cheapest_mask(mask)
    assert fields["mask"] in ("rows", "columns")
    packed = pack_mask(mask, fields)
    byte %= packed.numel()
    packed[byte] ^= 1 << bit
    try:
        again = unpack_mask(packed, {**fields, "shape": [20, 50]})
    except ValueError as error:
        assert "part 'mask'" in str(error)
    else:
        assert int(again.sum()) == fields["nnz"]
    with pytest.raises(ValueError, match="part 'mask'"):
        unpack_mask(packed[: packed.numel() // 3], {**fields, "shape": [20, 50]})


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 23),
    st.integers(1, 9),
    st.sampled_from([2, 4, 8]),
    shares,
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.integers(0, 99),
)
def test_matrices_round_trip_bit_for_bit(
    m: int, n: int, group: int, bits: int, share: float, flags: tuple[bool, bool, bool], seed: int
) -> None:
    mean, zero, by_input = flags
    how: dict[str, Any] = {"mean": mean, "zero": zero, "by_input": by_input and not zero}
    code = code_of(m, n, group=min(group, n), bits=bits, share=share, seed=seed, **how)
    assert torch.equal(code.dense(), slow_values(code))
    for dtype in (torch.float32, torch.bfloat16):
        spec, parts = pack(code, dtype)
        assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == format_of(spec).layout(spec)
        assert sum(part.numel() * part.itemsize for part in parts.values()) == nbytes(spec)
        assert torch.equal(unpack_partial_binary(parts, spec), code.dense(dtype))
        again = unpack(spec, parts)
        assert isinstance(again, PartialBinary)
        assert torch.equal(again.dense(), code.dense())
        assert torch.equal(again.signs, code.signs) and torch.equal(again.codes, code.codes)
        assert again.spec(dtype) == spec
        if code.salient.any():
            assert torch.equal(again.step, code.step)


def test_nothing_and_everything_salient() -> None:
    for share, absent in ((0.0, {"mask", "codes", "step"}), (1.0, {"mask"})):
        code = code_of(5, 9, share=share)
        parts = code.parts()
        assert not absent & parts.keys()
        assert torch.equal(PartialBinary.read(parts, code.spec(torch.float32)).dense(), code.dense())
    assert code_of(5, 9, share=1.0).parts()["signs"].numel() == 0


@pytest.mark.parametrize("name", ["signs", "scale", "mean", "codes", "step", "zero", "mask"])
def test_parts_that_do_not_fit_are_refused(name: str) -> None:
    code = code_of(20, 30, zero=True)
    spec, parts = code.spec(torch.float32), code.parts()
    for damaged in (parts[name][:-1], parts[name].to(torch.int32)):
        with pytest.raises(ValueError, match=name):
            PartialBinary.read({**parts, name: damaged}, spec)
    with pytest.raises(ValueError, match=name):
        PartialBinary.read({k: v for k, v in parts.items() if k != name}, spec)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"group": 0}, "groups of 0"),
        ({"bits": 9}, "9 bits"),
        ({"nnz": 601}, "601 salient"),
        ({"mask": "holes"}, "mask code 'holes'"),
        ({"mask": "rows", "rice": 7, "mask_bytes": 9}, "7 bits"),
        ({"by_input": True, "mask": "bitmap"}, "whole inputs"),
    ],
)
def test_specs_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    code = code_of(20, 30)
    with pytest.raises(ValueError, match=said):
        PartialBinary.read(code.parts(), {**code.spec(torch.float32), **wrong})


def test_what_cannot_be_stored_is_refused() -> None:
    code = code_of(4, 6, bits=4)
    with pytest.raises(ValueError, match="does not fit into 4 bits"):
        PartialBinary(**{**vars(code), "codes": code.codes | code.salient * 16}).parts()
    with pytest.raises(ValueError, match="scale"):
        PartialBinary(**{**vars(code), "scale": code.scale.float()}).parts()
    with pytest.raises(ValueError, match="whole inputs"):
        PartialBinary(**{**vars(code), "step": torch.ones(1, 6).half()}).parts()
