"""The products as operators of torch: fake kernels, gradients, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_matrices import DEVICE, needs_triton, relative_error, signs, stored, trits

import compressor.kernels.triton as kernels
from compressor.kernels.triton import ops
from compressor.kernels.triton.layouts import Planes

pytestmark = needs_triton

MATRICES = {"planes": trits(9, 160), "signs": signs(5, 160)}


def layout_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    parts, spec = stored(MATRICES[name], dtype)
    return kernels.prepare(parts, spec, DEVICE)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(name: str, grad: bool, with_bias: bool) -> None:
    layout = layout_of(name)
    x = torch.randn(2, 3, 160, device=DEVICE, requires_grad=grad)
    bias = torch.randn(layout.m, device=DEVICE, requires_grad=grad) if with_bias else None
    arguments = ops.planes_arguments(layout) if isinstance(layout, Planes) else ops.signs_arguments(layout)
    operator = getattr(torch.ops.compressor, ops.PLANES if isinstance(layout, Planes) else ops.SIGNS).default
    torch.library.opcheck(operator, (x, bias, *arguments, True, []))


def test_opcheck_of_the_matrix() -> None:
    arguments = ops.planes_arguments(layout_of("planes"))
    torch.library.opcheck(getattr(torch.ops.compressor, ops.DENSE).default, (*arguments, torch.float16))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", MATRICES)
def test_compiles_as_one_graph(name: str, backend: str) -> None:
    layout = layout_of(name)

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(kernels.apply(layout, 2 * x)) + 1

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for tokens in (1, 2, 5):
        x = torch.randn(tokens, 160, device=DEVICE)
        with torch.no_grad():
            assert torch.equal(compiled(x), block(x))


@pytest.mark.parametrize("name", MATRICES)
def test_gradients_are_those_of_the_matrix(name: str) -> None:
    layout = layout_of(name)
    x = torch.randn(3, 160, device=DEVICE, requires_grad=True)
    bias = torch.zeros(layout.m, device=DEVICE, requires_grad=True)
    given = torch.randn(3, layout.m, device=DEVICE)
    kernels.apply(layout, x, bias).backward(given)
    assert x.grad is not None and bias.grad is not None
    assert relative_error(x.grad, given.cpu().double() @ layout.dense().cpu().double()) < 1e-6
    assert relative_error(bias.grad, given.cpu().double().sum(0)) < 1e-6


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 100])
@pytest.mark.parametrize("exact", [False, True])
def test_cuda_graphs(name: str, tokens: int, exact: bool) -> None:
    layout = layout_of(name, torch.bfloat16)
    x = torch.randn(tokens, 160, device=DEVICE, dtype=torch.bfloat16)
    kernels.apply(layout, x, exact=exact)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.apply(layout, x, exact=exact)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, kernels.apply(layout, x, exact=exact))
