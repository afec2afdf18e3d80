"""Attention of one token by the kernels, against fp64; on every instruction set that this processor has."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.kernels.attention import attention, can_attend
from compressor.kernels.matrix import DTYPES
from compressor.kernels.native import LEVELS, Native

# batch, heads, heads of keys, keys, d, dv
SHAPES = (
    (1, 1, 1, 1, 16, 16), (1, 8, 8, 3, 64, 64), (2, 8, 2, 17, 16, 48), (1, 12, 4, 300, 80, 80), (3, 9, 3, 258, 128, 64),
    (1, 7, 1, 777, 64, 96), (2, 6, 6, 256, 32, 32), (1, 10, 2, 513, 96, 512), (1, 4, 2, 255, 512, 16),
)  # fmt: skip
# A digit of a result in bf16 or fp16; sums of fp32.
CLOSE = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """In fp64, head by head; (batch, 1, heads, dv)."""
    out = torch.zeros(q.shape[0], 1, q.shape[1], v.shape[3], dtype=torch.float64)
    for row, head in itertools.product(range(q.shape[0]), range(q.shape[1])):
        kv = head // (q.shape[1] // k.shape[1])
        scores = k[row, kv].double() @ q[row, head, 0].double() * scale
        seen = torch.ones(k.shape[2], dtype=torch.bool)
        if mask is not None:
            seen = mask.expand(q.shape[0], q.shape[1], 1, k.shape[2])[row, head, 0]
        if seen.any():
            out[row, 0, head] = scores[seen].softmax(0) @ v[row, kv].double()[seen]
    return out


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q of a projection, keys with room behind them, values of one; so that all strides differ."""
    batch, heads, kv, keys, d, dv = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, 1, heads, d, generator=g).transpose(1, 2)
    k = torch.randn(batch, kv, keys + 7, d, generator=g)
    v = torch.randn(batch, keys, kv, dv, generator=g).transpose(1, 2)
    return q.to(dtype) * 2, k.to(dtype)[:, :, :keys], v.to(dtype)


def masks(shape: tuple[int, ...]) -> list[Tensor | None]:
    batch, heads, _, keys, *_ = shape
    g = torch.Generator().manual_seed(keys)
    padded = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    padded[0, ..., : keys // 2] = False
    tail = torch.arange(keys) < max(1, keys // 3)  # as of a static cache
    own = torch.rand(batch, heads, 1, keys, generator=g) < 0.3
    own[0, 0] = False
    strided = (torch.rand(keys, batch, generator=g) < 0.5).T[:, None, None]
    return [None, padded, tail.view(1, 1, 1, -1), own, strided]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape: tuple[int, ...], dtype: torch.dtype, kernels: Native) -> None:
    q, k, v = inputs(shape, dtype)
    for mask in masks(shape):
        assert can_attend(q, k, v, mask)
        want = reference(q, k, v, mask, 0.2)
        for level in kernels.levels:
            found = attention(q, k, v, mask, 0.2, level)
            assert found.dtype == dtype and found.shape == want.shape
            assert (found.double() - want).abs().max() <= CLOSE[dtype] * max(1.0, float(want.abs().max())), level


def test_scores_of_any_size(kernels: Native) -> None:
    """Weights are those of e^x to a few digits of fp32, down to where nothing is left of them."""
    keys = 200
    scores = torch.linspace(-130, 40, keys)
    q = torch.ones(1, 1, 1, 16)
    k = (scores / 16).view(1, 1, keys, 1).expand(1, 1, keys, 16).contiguous()
    v = torch.eye(keys, 256).view(1, 1, keys, 256)  # the outputs are the weights
    want = k[0, 0].double().sum(1).softmax(0)
    for level in kernels.levels:
        found = attention(q, k, v, None, 1.0, level)[0, 0, 0, :keys].double()
        assert (found - want).abs().max() <= 2e-6
        near = want > 1e-30
        assert (found / want - 1).abs()[near].max() <= 4e-5  # scores are off by a digit of 130, too


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan(dtype: torch.dtype, kernels: Native) -> None:
    """A NaN reaches the heads that see it and no other; so does an infinity in a value."""
    shape = (2, 4, 2, 40, 32, 32)
    for level in kernels.levels:
        for what, place in itertools.product((math.nan, math.inf, -math.inf), ("q", "k", "v")):
            q, k, v = inputs(shape, dtype)
            want = attention(q, k, v, None, 0.2, level)
            hurt = {"q": q, "k": k, "v": v}[place].clone()
            hurt[1, 1, 0 if place == "q" else 33, 5] = what
            found = attention(**{"q": q, "k": k, "v": v} | {place: hurt}, mask=None, scale=0.2, level=level)
            touched = torch.zeros(2, 1, 4, 32, dtype=torch.bool)
            if place == "q":
                touched[1, :, 1] = True  # as 0 x inf, or inf - inf, in the softmax
            elif place == "k":
                touched[1, :, 2:] = True
            else:
                touched[1, :, 2:, 5] = True
            assert torch.equal(found[~touched], want[~touched]), (level, what, place)
            if place == "v":
                assert not found[touched].isfinite().any()
            elif place == "q" or math.isnan(what):
                assert found[touched].isnan().all()
            # a key that is hidden, and values of what nobody sees, change nothing
            if place == "k":
                mask = torch.ones(1, 1, 1, 40, dtype=torch.bool)
                mask[..., 33] = False
                hidden = attention(q, hurt, v, mask, 0.2, level)
                assert torch.equal(hidden, attention(q, k, v, mask, 0.2, level))


def test_the_same_bytes_for_any_number_of_threads(kernels: Native) -> None:
    for number, level in enumerate(kernels.levels):
        cases = [(inputs(shape, dtype), mask) for shape in SHAPES for dtype in DTYPES for mask in masks(shape)]
        torch.set_num_threads(1)
        want = [attention(*given, mask, 0.2, level) for given, mask in cases]
        for threads in random.Random(number).sample(range(2, 40), 3):
            torch.set_num_threads(threads)
            for (given, mask), before in zip(cases, want, strict=True):
                assert torch.equal(attention(*given, mask, 0.2, level), before), (level, threads)


def words(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Tensor, /, **changed: Any) -> list[Any]:
    """The arguments of the native function, some of them changed."""
    batch, heads, _, d = q.shape
    found: dict[str, Any] = {
        "q": q.data_ptr(), "q_room": q.numel(), "k": k.data_ptr(), "k_room": k.numel(), "v": v.data_ptr(),
        "v_room": v.numel(), "mask": mask.data_ptr(), "mask_room": mask.numel(), "out": out.data_ptr(),
        "dtype": DTYPES[q.dtype], "batch": batch, "heads": heads, "kv_heads": k.shape[1], "keys": k.shape[2], "d": d,
        "dv": v.shape[3], "q_row": q.stride(0), "q_head": q.stride(1), "k_row": k.stride(0), "k_head": k.stride(1),
        "k_key": k.stride(2), "v_row": v.stride(0), "v_head": v.stride(1), "v_key": v.stride(2),
        "mask_row": mask.stride(0), "mask_head": 0, "mask_key": 1, "scale": 0.5, "threads": 1, "level": 0,
    }  # fmt: skip
    assert not changed.keys() - found.keys()
    return list((found | changed).values())


def test_what_does_not_fit_is_an_error(kernels: Native) -> None:
    q, k, v = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 9, 32), torch.randn(2, 2, 9, 48)
    mask, out = torch.ones(2, 1, 1, 9, dtype=torch.bool), torch.full((2, 1, 4, 48), -7.0)
    call = kernels.module.attention
    wrong: dict[str, list[Any]] = {
        "q": [0, None, 1.5, q.data_ptr() + 2], "k": [0, k.data_ptr() + 1], "v": [0, v.data_ptr() + 3],
        "out": [0, out.data_ptr() + 1], "q_room": [-1, 0, q.numel() - 1], "k_room": [0, k.numel() - 1],
        "v_room": [0, v.numel() - 1], "mask_room": [0, mask.numel() - 1], "dtype": [-1, 3], "batch": [0, 3, 1 << 40],
        "heads": [0, 3, 6, 1 << 20], "kv_heads": [0, 3, 4], "keys": [0, 10, 1 << 40], "d": [0, 8, 31, 48, 528],
        "dv": [0, 17, 64, 1 << 33], "q_row": [-1, 129], "q_head": [-1, 33, 1 << 50], "k_row": [-1, 1 << 39],
        "k_head": [-288, 289], "k_key": [33, 1 << 40], "v_row": [1 << 39], "v_head": [433], "v_key": [49, -48],
        "mask_row": [10], "mask_head": [1], "mask_key": [2], "scale": ["one", None], "threads": [0, 1025],
        "level": [-1, len(LEVELS)],
    }  # fmt: skip
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match="does not fit"):
                call(*words(q, k, v, mask, out, **{name: value}))
    right = words(q, k, v, mask, out)
    for count in range(len(right)):
        with pytest.raises(ValueError, match="does not fit"):
            call(*right[:count])
    with pytest.raises(ValueError, match="number of arguments"):
        call(*right, 0)
    assert bool((out == -7).all())
    call(*right)
    assert not bool((out == -7).any())


def test_what_is_left_to_pytorch() -> None:
    """More than one token, other devices and dtypes, gradients, odd widths, vectors in pieces, masks of numbers."""
    q, k, v = inputs((2, 4, 2, 9, 32, 32), torch.float32)
    assert can_attend(q, k, v, None)
    assert not can_attend(q.expand(2, 4, 2, 32), k, v, None)
    assert not can_attend(q.to("meta"), k.to("meta"), v.to("meta"), None)
    assert not can_attend(q.double(), k.double(), v.double(), None)
    assert not can_attend(q, k.half(), v, None)
    assert not can_attend(q[..., :24], k[..., :24], v, None)
    assert not can_attend(q.mT.contiguous().mT, k, v[..., ::2].repeat(1, 1, 1, 2)[..., ::2], None)
    assert not can_attend(q[:, :3], k, v, None)
    assert not can_attend(q, k[:, :, :0], v[:, :, :0], None)
    assert not can_attend(q, k, v, torch.zeros(2, 1, 1, 9))
    assert not can_attend(q, k, v, torch.ones(2, 1, 1, 8, dtype=torch.bool))
    assert not can_attend(q, k, v, torch.ones(9, dtype=torch.bool))
    wanting = k.clone().requires_grad_()
    assert not can_attend(q, wanting, v, None)
    with torch.no_grad():
        assert can_attend(q, wanting, v, None)
