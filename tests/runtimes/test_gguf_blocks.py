"""Blocks of GGUF, packed by us and read by the ``gguf`` package."""

from __future__ import annotations

import numpy as np
import pytest
from foreign import need_package

from compressor.run.gguf_blocks import PACK
from compressor.run.gguf_types import BITS, CODES, Integers, decode, encode, exact_type, obstacle, rounded

ROWS, COLUMNS = 3, 512


@pytest.fixture(autouse=True)
def _needs() -> None:
    need_package("gguf")


def random_integers(kind: str, group: int, seed: int = 0) -> Integers:
    low, high = CODES[kind]
    random = np.random.default_rng(seed)
    scale = random.normal(size=(ROWS, COLUMNS // group)).astype(np.float16).astype(np.float32)
    return Integers(random.integers(low, high + 1, size=(ROWS, COLUMNS)).astype(np.int8), scale, group)


def values_of(integers: Integers) -> np.ndarray:
    """Slowly, weight by weight."""
    rows, columns = integers.codes.shape
    return np.array(
        [
            [np.float32(integers.codes[i, j]) * integers.scale[i, j // integers.group] for j in range(columns)]
            for i in range(rows)
        ],
        dtype=np.float32,
    )


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("group", [32, 128, 256, 512])
def test_integers_arrive_unchanged(kind: str, group: int) -> None:
    integers = random_integers(kind, group)
    values = values_of(integers)
    block = PACK[kind][0]
    if group % block:
        assert "do not fill blocks" in (obstacle(kind, integers, COLUMNS) or "")
        return
    written = encode(kind, values, integers, "w")
    assert written.loss == 0 and np.array_equal(decode(kind, written.data), values)
    assert written.data.dtype == np.uint8 and written.data.shape == (ROWS, COLUMNS * BITS[kind] / 8)


@pytest.mark.parametrize("kind", PACK)
def test_where_rounding_is_exact_the_bytes_are_those_of_gguf(kind: str) -> None:
    """With the largest code in every block, rounding finds the same scale."""
    integers = random_integers(kind, 256)
    integers.codes[:, :: PACK[kind][0]] = CODES[kind][0] if kind == "Q4_0" else 127 if kind == "Q8_0" else 1
    scale = np.exp2(np.arange(ROWS * 2, dtype=np.float32) - 3).reshape(ROWS, 2)  # nothing of 1 / scale is lost
    integers = Integers(np.maximum(integers.codes, -127), scale, 256)
    assert np.array_equal(encode(kind, values_of(integers), integers, "w").data, rounded(kind, values_of(integers)))


def test_the_smallest_exact_type_is_chosen() -> None:
    for kind, group, expected in (("TQ2_0", 256, "TQ2_0"), ("TQ2_0", 128, "Q4_0"), ("Q4_0", 32, "Q4_0"),
                                  ("Q8_0", 64, "Q8_0"), ("Q8_0", 16, None)):  # fmt: skip
        assert exact_type(random_integers(kind, group), COLUMNS) == expected
    assert exact_type(None, COLUMNS) is None
    assert exact_type(random_integers("Q4_0", 32), COLUMNS - 16) is None


def test_scales_that_are_no_fp16_numbers_are_an_obstacle() -> None:
    integers = random_integers("Q4_0", 32)
    for wrong in (1 + 2.0**-12, 1e6):
        integers.scale[1, 1] = wrong
        assert "fp16" in (obstacle("Q4_0", integers, COLUMNS) or "")
        with pytest.raises(ValueError, match="fp16"):
            PACK["Q4_0"][1](integers.codes, integers.scale)


@pytest.mark.parametrize("kind", PACK)
def test_codes_that_do_not_fit_are_refused(kind: str) -> None:
    block, pack = PACK[kind]
    with pytest.raises(ValueError, match="blocks"):
        pack(np.zeros((1, block + 8), dtype=np.int8), np.ones((1, 1), dtype=np.float32))
    if kind != "Q8_0":
        with pytest.raises(ValueError, match="codes from"):
            pack(np.full((1, block), 8, dtype=np.int8), np.ones((1, 1), dtype=np.float32))
