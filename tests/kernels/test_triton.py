"""The GPU kernels against fp64: on the CPU by Triton's interpreter, on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_matrices import DEVICE, integers, needs_triton, relative_error, rounded_activations, signs, stored, trits

import compressor.kernels.triton as kernels
from compressor.kernels.triton import ops
from compressor.kernels.triton.layouts import Planes
from compressor.kernels.triton.sparse_signs import SparseSigns

pytestmark = needs_triton

Matrix = Any
TIGHT = 2e-6  # sums in fp32, products of integers exact
LOOSE = {torch.float32: TIGHT, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # the interpreter cuts bf16 off


def prepared(matrix: Matrix, dtype: torch.dtype = torch.float32) -> Planes | SparseSigns:
    parts, spec = stored(matrix, dtype)
    assert kernels.supports(spec, DEVICE) is None
    return kernels.prepare(parts, spec, DEVICE)


def activations(tokens: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(layout: Any, x: Tensor, bias: Tensor | None = None, *, exact: bool, tile: tuple[int, ...] = ()) -> Tensor:
    bias = None if bias is None else bias.to(DEVICE)
    return ops.linear(x.to(DEVICE), bias, layout, exact=exact, tile=tile).cpu()


MATRICES: dict[str, Matrix] = {
    "two planes, odd sizes": trits(19, 300),
    "one plane, groups of 64": trits(9, 256, planes=1, group=64),
    "three planes, groups of 96": trits(5, 288, planes=3, group=96),
    "two planes, a group a row": trits(7, 130, group=130),
    "two planes, long groups": trits(6, 512, group=256),
    "2 bits": integers(9, 256, bits=2),
    "3 bits with zeros": integers(9, 256, bits=3, zeros=True),
    "4 bits, groups of 32": integers(9, 192, bits=4, group=32),
    "4 bits with zeros, a group a row": integers(9, 200, bits=4, group=200, zeros=True),
    "8 bits": integers(9, 256, bits=8),
    "8 bits with zeros, groups of 64": integers(6, 256, bits=8, group=64, zeros=True),
}


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 16, 64])
@pytest.mark.parametrize("name", MATRICES)
def test_rounded_activations(name: str, tokens: int) -> None:
    matrix = MATRICES[name]
    weight = matrix.dense().double()
    x, bias = activations(tokens, weight.shape[1]), torch.randn(weight.shape[0])
    expected = rounded_activations(x) @ weight.T + bias
    assert relative_error(product(prepared(matrix), x, bias, exact=False), expected) < TIGHT


@pytest.mark.parametrize("name", MATRICES)
def test_one_token_with_and_without_a_launch_to_round_it(name: str) -> None:
    from compressor.kernels.triton import launch

    matrix = MATRICES[name]
    weight, layout = matrix.dense().double(), prepared(matrix)
    assert isinstance(layout, Planes)
    x = activations(1, weight.shape[1])
    expected = rounded_activations(x) @ weight.T
    assert relative_error(launch.gemv(x.to(DEVICE), layout, None), expected) < TIGHT
    group = layout.group if layout.group < layout.n else 128
    assert launch.fusible(layout) == (group % 128 == 0 and layout.run == 16 * layout.bits)
    if launch.fusible(layout):
        assert relative_error(launch.fused_gemv(x.to(DEVICE), layout, None), expected) < TIGHT


@pytest.mark.parametrize("tokens", [1, 5, 33, 64])
@pytest.mark.parametrize("name", MATRICES)
def test_activations_as_they_are(name: str, tokens: int) -> None:
    matrix = MATRICES[name]
    weight = matrix.dense().double()
    x = activations(tokens, weight.shape[1])
    assert relative_error(product(prepared(matrix), x, exact=True), x.double() @ weight.T) < TIGHT


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_of_activations(dtype: torch.dtype, tokens: int, exact: bool) -> None:
    matrix = trits(10, 256)
    x, bias = activations(tokens, 256, dtype), torch.randn(10).to(dtype)
    found = product(prepared(matrix, dtype), x, bias, exact=exact)
    assert found.dtype == dtype
    kept = x.double() if exact or tokens > 64 else rounded_activations(x)
    assert relative_error(found, kept @ matrix.dense().double().T + bias.double()) < LOOSE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MATRICES)
def test_many_tokens_use_the_matrix_as_the_format_unpacks_it(name: str, dtype: torch.dtype) -> None:
    from compressor.kernels.triton import launch

    layout = prepared(MATRICES[name], dtype)
    assert isinstance(layout, Planes)
    assert torch.equal(launch.dense(layout, dtype), layout.dense())
    x = activations(70, layout.n)
    expected = x.double() @ layout.dense().cpu().double().T
    assert relative_error(product(layout, x, exact=False), expected) < TIGHT


@pytest.mark.parametrize("name", ["two planes, odd sizes", "8 bits with zeros, groups of 64"])
@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("tile", [(8, 256, 2, 2, 2), (32, 128, 1, 1, 3)])
def test_any_tile_gives_the_same(name: str, tokens: int, tile: tuple[int, ...]) -> None:
    """Splits included: their sums are added in order, so that a call repeats bit for bit."""
    matrix = trits(19, 1100) if name.startswith("two") else integers(19, 1088, bits=8, group=64, zeros=True)
    weight = matrix.dense().double()
    x, bias = activations(tokens, weight.shape[1]), torch.randn(19)
    layout = prepared(matrix)
    found = product(layout, x, bias, exact=False, tile=tile)
    assert relative_error(found, rounded_activations(x) @ weight.T + bias) < TIGHT
    assert torch.equal(found, product(layout, x, bias, exact=False, tile=tile))


SIGNS: dict[str, Matrix] = {
    "means and zeros": signs(9, 300),
    "neither": signs(6, 256, mean=False, zeros=False),
    "groups of 16": signs(5, 144, group=16),
    "a group a row": signs(5, 200, group=200),
    "whole inputs": signs(5, 256, by_input=True),
    "nothing salient": signs(5, 256, share=0.0),
    "codes of 4 bits": signs(5, 256, bits=4),
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", SIGNS)
def test_signs_with_salient_weights(name: str, tokens: int, exact: bool) -> None:
    """Salient weights meet activations as they are in both modes; signs, what rounding leaves of them."""
    matrix = SIGNS[name]
    weight = matrix.dense().double()
    groups = torch.arange(weight.shape[1]) // matrix.group
    low = -matrix.scale.double() + (0 if matrix.mean is None else matrix.mean.double())
    of_signs = torch.where(matrix.salient, low[:, groups], weight)
    x, bias = activations(tokens, weight.shape[1]), torch.randn(weight.shape[0])
    kept = x.double() if exact else rounded_activations(x)
    expected = kept @ of_signs.T + x.double() @ (weight - of_signs).T + bias
    assert relative_error(product(prepared(matrix), x, bias, exact=exact), expected) < TIGHT


def test_signs_for_many_tokens() -> None:
    x = activations(6, 300)
    expected = x.double() @ SIGNS["means and zeros"].dense().double().T
    assert relative_error(product(prepared(SIGNS["means and zeros"]), x, exact=False), expected) < TIGHT


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("matrix", [trits(9, 200), integers(9, 256, zeros=True), signs(5, 200)])
def test_a_bad_activation_spoils_its_token_and_no_other(matrix: Matrix, exact: bool, bad: float) -> None:
    layout = prepared(matrix)
    x = activations(1, layout.n)
    x[0, 150] = bad
    assert not product(layout, x, exact=exact).isfinite().any()
    for tokens in (2, 5) if isinstance(layout, Planes) else (2,):
        x = activations(tokens, layout.n)
        x[1, 150] = bad
        found, clean = product(layout, x, exact=exact), product(layout, activations(tokens, layout.n), exact=exact)
        assert not found[1].isfinite().any()
        if not exact:
            assert found[1].isnan().all()
        others = torch.arange(tokens) != 1
        assert torch.equal(found[others], clean[others])


def test_zeros_and_tiny_activations_are_zeros() -> None:
    layout = prepared(trits(9, 256))
    x = torch.zeros(3, 256)
    x[1] = 1e-40
    x[2, :128] = 1e30
    found = product(layout, x, exact=False)
    assert torch.equal(product(layout, x[:1], exact=False), torch.zeros(1, 9))
    assert torch.equal(found[:2], torch.zeros(2, 9))
    assert found[2].isfinite().all() and (found[2] != 0).any()


def test_shapes_strides_and_no_tokens_at_all() -> None:
    matrix = trits(9, 256)
    layout, weight = prepared(matrix), matrix.dense().double()
    x = activations(6, 512)[:, ::2].unflatten(0, (2, 3))
    found = product(layout, x, exact=False)
    assert found.shape == (2, 3, 9)
    assert relative_error(found.flatten(0, 1), rounded_activations(x.flatten(0, 1)) @ weight.T) < TIGHT
    assert product(layout, x[:0], exact=False).shape == (0, 3, 9)
    assert product(layout, x[0, 0], exact=False).shape == (9,)
    one = prepared(trits(1, 32, group=32))
    assert product(one, activations(1, 32), exact=True).shape == (1, 1)


def test_what_cannot_be_multiplied_is_refused() -> None:
    layout = prepared(trits(9, 256))
    with pytest.raises(ValueError, match="float64"):
        kernels.apply(layout, torch.zeros(1, 256, dtype=torch.float64, device=DEVICE))
    with pytest.raises(ValueError, match="256 inputs"):
        kernels.apply(layout, torch.zeros(1, 255, device=DEVICE))
