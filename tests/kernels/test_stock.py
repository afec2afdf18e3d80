"""The rung without kernels of our own: PyTorch's integer products against fp64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import integer_models
import pytest
import torch
from torch import Tensor

from compressor.formats import pack
from compressor.kernels import stock
from compressor.kernels.stock import FEW, FEW_IN_8_BITS, Int4Pack, Int8Chunks, has_int8, make_stock

needs_int8 = pytest.mark.skipif(not has_int8(), reason="PyTorch's int8 product is not here, or slow on this processor")


def weight(m: int = 48, n: int = 1312) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m + n))


CODES: dict[str, Any] = {
    "two planes": lambda: integer_models.trits(weight(), 32, planes=2),
    "three planes": lambda: integer_models.trits(weight(40, 512), 512, planes=3),
    "8-bit integers": lambda: integer_models.rounded(weight(), bits=8, group=32),
    "5-bit integers, rows": lambda: integer_models.rounded(weight(33, 700), bits=5, group="row", asymmetric=True),
}


def made(code: Any, dtype: torch.dtype = torch.float32) -> Any:
    spec, parts = pack(code, dtype)
    return make_stock(parts, spec, dtype)


def rounded_product(dense: Tensor, x: Tensor) -> Tensor:
    """In fp64, weights and activations rounded to 8 bits as `Int8Chunks` says."""
    total = torch.zeros(len(x), len(dense), dtype=torch.float64)
    for w, part in zip(dense.float().split(stock.CHUNK, 1), x.float().split(stock.CHUNK, 1), strict=True):
        scale = w.abs().amax(1, keepdim=True) / 127
        codes = (w / scale).round().double() * scale.double()
        low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        step = (high - low) / 255
        zero = (-low / step).round()
        total += (((part / step + zero).round().clamp(0, 255) - zero).double() * step.double()) @ codes.T
    return total


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CODES)
def test_8_bits(name: str, dtype: torch.dtype) -> None:
    code = CODES[name]()
    product = made(code, dtype)
    assert isinstance(product, Int8Chunks)
    exact = code.dense(torch.float64)
    for tokens in range(1, FEW_IN_8_BITS + 1):
        x = torch.randn(tokens, exact.shape[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
        bias = torch.randn(len(exact))
        found = product.product(x, bias, "", False)
        assert found.dtype == dtype and found.shape == (tokens, len(exact))
        want = rounded_product(exact.to(dtype), x) + bias
        digit = 2**-8 if dtype == torch.bfloat16 else 0
        largest = float(want.abs().max())
        # a number half way between two of 8 bits may go to either: a 127th of an activation at most, in few of them
        assert float((found.double() - want).abs().max()) <= (4e-3 + digit) * largest
        off = float((found.double() - (x.double() @ exact.T + bias)).norm() / want.norm())
        assert 1e-4 < off < 0.02
    many = torch.randn(FEW_IN_8_BITS + 1, exact.shape[1]).to(dtype)
    assert torch.equal(product.product(many, None, "", False), many @ code.dense(dtype).T)


@needs_int8
def test_nan_and_infinity_are_seen() -> None:
    """PyTorch's int8 product forgets about NaN; the plain matrix, which is asked then, does not."""
    code = CODES["two planes"]()
    product, dense = made(code), code.dense(torch.float32)
    for what in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(2, 1312)
        x[1, 900] = what
        found = product.product(x, None, "", False)
        torch.testing.assert_close(found, x @ dense.T, rtol=1e-4, atol=1e-3, equal_nan=True)
        assert found[0].isfinite().all() and not found[1].isfinite().all()


@needs_int8
def test_copies() -> None:
    product = made(CODES["two planes"]())
    x = torch.randn(1, 1312)
    want = product.product(x, None, "", False)
    for other in (copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
        assert torch.equal(other.product(x, None, "", False), want)
    hidden = 48 * 1312 + 4 * 48 * 3
    assert product.nbytes == hidden + 4 * 48 * 1312
    assert (product.read_nbytes(1), product.read_nbytes(3)) == (hidden, 4 * 48 * 1312)


def test_4_bits_hold_what_they_can() -> None:
    """One plane of trits and integers of up to 4 bits; two planes where PyTorch's int8 product is not to be had."""
    for code in (
        integer_models.trits(weight(48, 512), 128),
        integer_models.rounded(weight(48, 512), bits=4, group=128),
    ):
        product = made(code)
        assert isinstance(product, Int4Pack) and len(product.packed) == 1
        x = torch.randn(FEW, 512)
        want = x.bfloat16().double() @ code.dense(torch.float64).T
        assert (product.product(x, None, "", False) - want).norm() <= 0.01 * want.norm()


@pytest.mark.parametrize("planes", [2, 3])
def test_without_the_int8_product(planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "has_int8", lambda: False)
    code = integer_models.trits(weight(48, 512), 128, planes=planes)
    product = made(code)
    if planes == 3:
        assert product is None
        return
    assert isinstance(product, Int4Pack) and len(product.packed) == 2
    x = torch.randn(2, 512)
    want = x.bfloat16().double() @ code.dense(torch.float64).T
    assert (product.product(x, None, "", False) - want).norm() <= 0.01 * want.norm()
