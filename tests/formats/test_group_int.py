"""Group integers: exact, in the bytes of compressed-tensors, and with the values that it makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.formats.group_int import (
    GroupInt,
    layout_group_int,
    pack_rows,
    portable_scale,
    unpack_group_int,
    unpack_rows,
)

BITS = range(2, 9)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
quick = settings(max_examples=60, deadline=None)


def random_codes(m: int, n: int, bits: int, seed: int = 0) -> Tensor:
    """Return (m, n) int8 over the whole range."""
    top = 2 ** (bits - 1)
    return torch.randint(-top, top, (m, n), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def random_int(m: int, n: int, group: int, bits: int, *, asymmetric: bool = False, seed: int = 0) -> GroupInt:
    """Return group integers with scales of both signs and many sizes."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(m, n // group, generator=generator) * 2.0 ** torch.randint(
        -20, 5, (m, n // group), generator=generator
    )
    zero = random_codes(m, n // group, bits, seed + 1) if asymmetric else None
    return GroupInt(random_codes(m, n, bits, seed), portable_scale(size, bits), zero, bits)


def bits_of(tensor: Tensor) -> Tensor:
    """Return the bit patterns: equality that tells -0 from 0."""
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def slow_rows(codes: Tensor, bits: int) -> list[list[int]]:
    """Words of each row, bit by bit."""
    rows = []
    for row in codes.tolist():
        stream = [(code + 2 ** (bits - 1)) >> bit & 1 for code in row for bit in range(bits)]
        stream += [0] * (-len(stream) % 32)
        words = [sum(flag << i for i, flag in enumerate(stream[a : a + 32])) for a in range(0, len(stream), 32)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return rows


@given(st.integers(1, 5), st.integers(1, 70), st.integers(2, 8), st.integers(0, 10**6))
@quick
def test_rows_are_streams_of_bits_in_whole_words(m: int, n: int, bits: int, seed: int) -> None:
    codes = random_codes(m, n, bits, seed)
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32 and packed.tolist() == slow_rows(codes, bits)
    assert torch.equal(unpack_rows(packed, bits, n), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 31, 32, 33, 172, 320])
def test_rows_are_those_of_the_package(bits: int, n: int) -> None:
    codes = random_codes(7, n, bits)
    packed = pack_rows(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("m", "n", "group"), [(5, 172, 43), (33, 64, 64), (3, 10, 1), (1, 128, 32)])
def test_the_package_makes_the_same_values(
    bits: int, dtype: torch.dtype, asymmetric: bool, m: int, n: int, group: int
) -> None:
    code = random_int(m, n, group, bits, asymmetric=asymmetric)
    spec, parts = code.spec(dtype), code.parts(dtype)
    expected = code.dense(dtype)
    assert torch.isfinite(expected).all() and expected.dtype == dtype
    assert torch.equal(bits_of(unpack_group_int(parts, spec)), bits_of(expected))
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": not asymmetric}
    weights |= {"strategy": "channel"} if group == n else {"strategy": "group", "group_size": group}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    package = BaseCompressor.get_value_from_registry("pack-quantized")
    found = package.decompress({f"weight_{part}": tensor for part, tensor in parts.items()}, scheme)["weight"]
    assert torch.equal(bits_of(found), bits_of(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_values_are_computed_in_fp32_and_rounded_once(dtype: torch.dtype, asymmetric: bool) -> None:
    code = random_int(4, 12, 3, 5, asymmetric=asymmetric)
    for i in range(4):
        for j in range(12):
            zero = 0 if code.zero is None else int(code.zero[i, j // 3])
            exact = (int(code.codes[i, j]) - zero) * float(code.scale[i, j // 3])  # fp64 holds the product exactly
            assert code.dense(dtype)[i, j] == torch.tensor(exact, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("m", "n", "group"), [(5, 172, 43), (0, 8, 4), (4, 0, 1), (1, 1, 1)])
def test_parts_are_as_the_layout_says_and_read_back(bits: int, asymmetric: bool, m: int, n: int, group: int) -> None:
    code = random_int(m, n, group, bits, asymmetric=asymmetric)
    for dtype in DTYPES:
        parts, spec = code.parts(dtype), code.spec(dtype)
        assert {part: (tuple(t.shape), t.dtype) for part, t in parts.items()} == layout_group_int(spec)
        again = GroupInt.read(parts, spec)
        assert torch.equal(again.codes, code.codes) and torch.equal(again.scale, code.scale)
        assert again.scale.dtype == torch.float32 and again.bits == bits
        assert (again.zero is None) == (not asymmetric)
        assert code.zero is None or torch.equal(again.zero, code.zero)


def test_the_bytes_are_those_of_the_bits_and_the_scales() -> None:
    code = random_int(64, 256, 128, 3)
    sizes = {part: tensor.nbytes for part, tensor in code.parts(torch.bfloat16).items()}
    assert sizes == {"packed": 64 * 256 * 3 // 8, "scale": 64 * 2 * 2, "shape": 16}


@given(st.floats(allow_nan=False, width=32), st.integers(2, 8))
@quick
def test_portable_scales_fit_everywhere(value: float, bits: int) -> None:
    scale = portable_scale(torch.tensor([value]), bits)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(scale.to(dtype).float(), scale)
    assert torch.equal(portable_scale(scale, bits), scale)  # nothing is left to round
    assert (scale.item() < 0) == (value < 0) and scale.item() != 0
    assert (
        torch.isfinite((scale * 2 ** (bits - 1)).half()).all() and torch.isfinite((scale * (2**bits - 1)).half()).all()
    )
    if 2.0**-14 <= abs(value) <= 2.0 ** (16 - bits):
        assert abs(scale.item() - value) <= abs(value) * 2.0**-8 * 1.01


def test_what_cannot_be_stored_is_refused() -> None:
    code = random_int(4, 8, 4, 3)
    with pytest.raises(ValueError, match="do not fit into 3 bits"):
        GroupInt(torch.full((4, 8), 4, dtype=torch.int8), code.scale, None, 3).parts()
    with pytest.raises(ValueError, match="bf16 and fp16"):
        GroupInt(code.codes, torch.full((4, 2), 0.1), None, 3).parts()
    with pytest.raises(ValueError, match="not a number"):
        GroupInt(code.codes, torch.full((4, 2), torch.nan), None, 3).parts()
    with pytest.raises(ValueError, match="with scales"):
        GroupInt(code.codes, code.scale[:, :1].expand(4, 3), None, 3).parts()
    with pytest.raises(ValueError, match="zero points"):
        GroupInt(code.codes, code.scale, torch.zeros(4, 2), 3).parts()


def test_what_does_not_fit_the_spec_is_refused() -> None:
    code = random_int(4, 8, 4, 3)
    parts, spec = code.parts(torch.float16), code.spec(torch.float16)
    with pytest.raises(ValueError, match="'scale' is"):
        unpack_group_int(parts, spec | {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="'shape' says"):
        unpack_group_int(parts | {"shape": torch.tensor([8, 4])}, spec)
    with pytest.raises(ValueError, match="missing"):
        unpack_group_int(parts, spec | {"symmetric": False})
    with pytest.raises(ValueError, match="do not divide"):
        unpack_group_int(parts, spec | {"group": 3})
    with pytest.raises(ValueError, match="2 to 8"):
        unpack_group_int(parts, spec | {"bits": 9})
