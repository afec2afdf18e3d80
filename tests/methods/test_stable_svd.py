"""The differentiable SVD: right where singular values differ, finite where they do not; and the gates on top of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.methods.gates import PUBLISHED_EDGE, openness
from compressor.methods.stable_svd import BOUND, TERMS, quotients, stable_svd
from compressor.run.gates_paper import truncated_outputs


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (2, 6, 3)])
def test_it_is_the_svd(shape: tuple[int, ...]) -> None:
    y = matrix(*shape)
    U, s, V = stable_svd(y)
    assert torch.allclose((U * s[..., None, :]) @ V.mT, y) and bool((s.diff() <= 0).all())


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (2, 6, 3)])
def test_the_gradient_is_that_of_finite_differences(shape: tuple[int, ...]) -> None:
    """Of functions of all three that do not depend on the signs of the vectors."""
    left, right = matrix(shape[-2], shape[-2], seed=1), matrix(shape[-1], shape[-1], seed=2)

    def loss(y: Tensor) -> Tensor:
        U, s, V = stable_svd(y)
        kept = torch.arange(1.0, s.shape[-1] + 1, dtype=y.dtype).reciprocal()
        projections = (left * ((U * kept) @ U.mT)).sum() + (right * ((V * kept.square()) @ V.mT)).sum()
        return projections + s.pow(3).sum() + ((U * kept * s[..., None, :]) @ V.mT).sin().sum()

    y = matrix(*shape).requires_grad_(True)
    assert torch.autograd.gradcheck(loss, (y,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("position", [0.4, 1.47, 2.52])
def test_the_gradient_of_gated_outputs(position: float) -> None:
    """With respect to outputs and position."""
    y, at = matrix(6, 4).requires_grad_(True), torch.tensor(position, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, at: truncated_outputs(y, at, 3), (y, at), eps=1e-7, atol=1e-5)


def test_quotients_are_the_published_ones() -> None:
    s = torch.tensor([3.0, 2.0, 2.0, 2.0 - 0.5e-10, 1e-11, 0.0], dtype=torch.float64)
    E = quotients(s)
    assert torch.equal(E, -E.T)
    assert float(E[1, 0]) == pytest.approx(1 / 5)
    assert float(E[2, 1]) == pytest.approx((TERMS + 1) / 4) and float(E[3, 2]) == pytest.approx((TERMS + 1) / 4)
    assert float(E[5, 4]) == BOUND
    assert float(E[5, 0]) == pytest.approx(1 / 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["equal", "zero", "deficient", "nothing", "one row"])
def test_finite_where_singular_values_are_equal_or_zero(kind: str, dtype: torch.dtype) -> None:
    y = {
        "equal": torch.eye(5, 4),
        "zero": torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0])),
        "deficient": (matrix(6, 2) @ matrix(2, 5, seed=3)).float(),
        "nothing": torch.zeros(3, 4),
        "one row": torch.ones(1, 4),
    }[kind].to(dtype)
    y.requires_grad_(True)
    at = torch.tensor(1.5, dtype=dtype, requires_grad=True)
    (truncated_outputs(y, at, 4) * torch.arange(1.0, y.numel() + 1).view_as(y)).sum().backward()
    assert y.grad is not None and at.grad is not None
    assert bool(torch.isfinite(y.grad).all()) and bool(torch.isfinite(at.grad))
    U, s, V = stable_svd(y)
    (U.sum() + s.sum() + V.sum()).backward()
    assert bool(torch.isfinite(y.grad).all())


def test_the_published_gate() -> None:
    """1/2 tanh(10 (k - i)) + 1/2."""
    at = torch.tensor(2.3)
    wanted = 0.5 * torch.tanh(10 * (2.3 - (torch.arange(5) + 0.5))) + 0.5
    assert torch.allclose(openness(at, 5, PUBLISHED_EDGE), wanted, atol=1e-6)


def test_all_components_are_let_through() -> None:
    """Also in a window shorter than the matrix has components, and of a matrix with fewer inputs than outputs."""
    for tokens, m, n in ((3, 8, 8), (12, 8, 5), (12, 4, 9)):
        y = matrix(tokens, n) @ matrix(n, m, seed=4)
        count = min(m, n)
        kept = truncated_outputs(y, torch.tensor(float(count + 1), dtype=y.dtype), count)
        assert torch.allclose(kept, y, atol=1e-8)
