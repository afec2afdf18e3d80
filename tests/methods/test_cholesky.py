from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressor.methods import cholesky
from tests.methods.reference import correlated


def spd(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    H = correlated(1, n)[1]
    return (H + 0.01 * H.diagonal().mean() * torch.eye(n)).to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 200, 700, 1500])
def test_factor_agrees_with_lapack_in_fp64(n: int) -> None:
    A = spd(n)
    U = cholesky.upper_inverse_factor(A)
    expected = torch.linalg.cholesky(torch.linalg.inv(A.double()), upper=True)
    assert relative(U, expected) < 2e-5
    assert torch.equal(U, U.triu())
    assert relative(cholesky.upper_inverse_factor(A.double()), expected) < 1e-11


@pytest.mark.parametrize("n", [1, 64, 130, 1100])
def test_inverse(n: int) -> None:
    A = spd(n)
    got = cholesky.inverse(A)
    assert relative(got, torch.linalg.inv(A.double())) < 2e-5
    assert relative(got, got.T) < 1e-6


def test_input_is_left_alone() -> None:
    A = spd(150)
    before = A.clone()
    cholesky.inverse(A)
    cholesky.upper_inverse_factor(A)
    assert torch.equal(A, before)


def test_indefinite_is_refused() -> None:
    A = torch.eye(200)
    A[150, 150] = -1
    with pytest.raises(cholesky.NotPositiveDefiniteError):
        cholesky.upper_inverse_factor(A)


@pytest.mark.parametrize("n", [16, 48, 64, 100, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_on_one_and_two_threads(n: int, dtype: torch.dtype, on_threads: Callable[..., list[Tensor]]) -> None:
    A = spd(n, dtype)
    assert torch.equal(*on_threads(cholesky.upper_inverse_factor, A))
    assert torch.equal(*on_threads(cholesky.inverse, A))


@pytest.mark.parametrize("n", [8, 31, 32, 63, 64])
def test_lapack_blocks_do_not_depend_on_threads(n: int, on_threads: Callable[..., list[Tensor]]) -> None:
    for seed in range(10):
        A = correlated(1, n, seed)[1] + torch.eye(n)
        first, second = on_threads(torch.linalg.cholesky, A)
        assert torch.equal(first, second)
        assert torch.equal(*on_threads(cholesky._small_inverse, first))
