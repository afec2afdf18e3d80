"""Signs with scales of rows and inputs: exact on disk, small, and refused where parts do not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.formats import ScaledBinary, format_of, nbytes, pack, unpack

quick = settings(max_examples=80, deadline=None)


def random_code(m: int, n: int, k: int, bits: int, seed: int = 0) -> ScaledBinary:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    salient = torch.zeros(n, dtype=torch.bool)
    salient[torch.randperm(n, generator=generator)[:k]] = True
    signs = torch.rand(m, n - k, generator=generator) < 0.5
    codes = torch.randint(0, 2**bits, (m, k), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (m,), generator=generator, dtype=torch.uint8)
    return ScaledBinary(signs, normal(m), normal(m), normal(n - k), salient, codes, normal(m), zero, bits)


@given(
    st.integers(1, 9), st.integers(1, 40), st.floats(0, 1), st.integers(2, 8), st.sampled_from(["float32", "bfloat16"])
)
@quick
def test_codes_come_back_bit_for_bit(m: int, n: int, share: float, bits: int, dtype: str) -> None:
    code = random_code(m, n, round(share * n), bits, seed=n)
    kind = getattr(torch, dtype)
    spec, parts = pack(code, kind)
    assert sum(part.numel() * part.itemsize for part in parts.values()) == nbytes(spec)
    again = unpack(spec, parts)
    assert isinstance(again, ScaledBinary)
    for name in ("signs", "scale", "mean", "column", "salient", "codes", "step", "zero"):
        assert torch.equal(getattr(again, name), getattr(code, name))
    assert torch.equal(format_of(spec).unpack(parts, spec), code.dense(kind))


def test_every_value_is_the_formula() -> None:
    code = random_code(4, 11, 3, 4)
    dense, binary, kept = code.dense(), iter(range(8)), iter(range(3))
    for j in range(11):
        b = next(kept) if code.salient[j] else next(binary)
        for i in range(4):
            if code.salient[j]:
                value = (float(code.codes[i, b]) - float(code.zero[i])) * float(code.step[i])
            else:
                sign = 1 if code.signs[i, b] else -1
                value = float(code.column[b]) * (float(code.mean[i]) + sign * float(code.scale[i]))
            assert float(dense[i, j]) == pytest.approx(value, rel=1e-6, abs=1e-9)


def test_the_size_is_the_published_one() -> None:
    """A fifth of the inputs at 4 bits, the rest at 1: about 1.61 bits on large matrices, vectors and mask included."""
    shape = {"format": "scaled-binary", "shape": [4096, 4096], "dtype": "bfloat16", "inputs": 819, "bits": 4}
    assert 8 * nbytes(shape) / 4096**2 == pytest.approx(1.62, abs=0.01)


def test_what_does_not_fit_is_refused() -> None:
    spec, parts = pack(random_code(4, 11, 3, 4), torch.float32)
    with pytest.raises(ValueError, match="marks 3 inputs, expected 4"):
        other = random_code(4, 11, 4, 4)
        unpack({**spec, "inputs": 4}, {**pack(other, torch.float32)[1], "salient": parts["salient"]})
    with pytest.raises(ValueError, match="'column'"):
        unpack(spec, {**parts, "column": parts["column"][:-1]})
    with pytest.raises(ValueError, match="12 salient inputs of 11"):
        nbytes({**spec, "inputs": 12})
    with pytest.raises(ValueError, match="9 bits"):
        nbytes({**spec, "bits": 9})
