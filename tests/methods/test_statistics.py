from __future__ import annotations

import pytest
import torch

from compressor.methods import statistics as module
from compressor.methods.cholesky import NotPositiveDefiniteError
from compressor.methods.table import FactorizationError, InputStatistics, NonFiniteHessianError, accumulate
from tests.methods.reference import correlated, published_factor


def test_accumulate_sums_outer_products_in_fp32() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 7, generator=g).bfloat16()
    H = torch.zeros(7, 7)
    accumulate(H, x[:20])
    accumulate(H, x[20:])
    expected = sum(torch.outer(row.double(), row.double()) for row in x)
    assert torch.allclose(H.double(), expected, rtol=1e-5, atol=1e-5)
    assert H.dtype == torch.float32


def test_factor_is_the_published_one_and_cached() -> None:
    _, H, tokens = correlated(1, 200)
    stats = InputStatistics(H, tokens)
    factor = stats.factor(0.01)
    expected = published_factor(H, 0.01)
    assert torch.allclose(factor.upper.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert factor.rungs == () and factor.damp == 0.01 and not factor.dead.any()
    assert stats.factor(0.01) is factor
    assert stats.factor(0.1) is not factor


def test_factor_in_another_order_is_that_of_the_ordered_hessian_and_cached() -> None:
    _, H, _ = correlated(4, 30)
    stats = InputStatistics(H, 100)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    found = stats.factor(0.01, order)
    assert torch.equal(found.upper, InputStatistics(H[order][:, order], 100).factor(0.01).upper)
    assert stats.factor(0.01, order.clone()) is found
    assert not torch.equal(stats.factor(0.01, order.flip(0)).upper, found.upper)
    assert not torch.equal(stats.factor(0.01).upper, found.upper)


def test_scale_of_the_hessian_does_not_matter() -> None:
    _, H, tokens = correlated(1, 90)
    H[5] = H[:, 5] = 0
    one, other = InputStatistics(H, tokens).factor(0.01), InputStatistics(H * 2.0**-20, tokens).factor(0.01)
    assert torch.equal(one.upper * 2.0**10, other.upper)


def test_dead_inputs() -> None:
    _, H, tokens = correlated(1, 60)
    H[[3, 40]] = 0
    H[:, [3, 40]] = 0
    factor = InputStatistics(H, tokens).factor(0.01)
    assert factor.dead.nonzero().flatten().tolist() == [3, 40]
    live = ~factor.dead
    alone = InputStatistics(H[live][:, live].contiguous(), tokens).factor(0.01)
    assert torch.allclose(factor.upper[live][:, live], alone.upper, rtol=1e-4, atol=1e-7)
    assert factor.upper[3, 4:].abs().max() == 0


def test_all_dead() -> None:
    factor = InputStatistics(torch.zeros(9, 9), 4).factor(0.01)
    assert factor.dead.all() and torch.isfinite(factor.upper).all()


def test_fewer_tokens_than_inputs() -> None:
    _, H, tokens = correlated(1, 300, tokens=20)
    assert InputStatistics(H, tokens).factor(0.01).rungs == ()


def test_norms_are_root_mean_squares() -> None:
    x = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    stats = InputStatistics(x.T @ x, 2)
    assert torch.allclose(stats.norms(), torch.tensor([12.5**0.5, 0.0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_hessian(value: float) -> None:
    H = torch.eye(8)
    H[2, 3] = value
    with pytest.raises(NonFiniteHessianError, match="1 of 64 entries"):
        InputStatistics(H, 5).factor(0.01)
    assert issubclass(NonFiniteHessianError, FactorizationError)


def test_ladder_raises_the_damping() -> None:
    H = torch.eye(40)
    H[0, 1] = H[1, 0] = 1.05  # smallest eigenvalue -0.05
    factor = InputStatistics(H, 5).factor(0.01)
    assert factor.rungs == ("fp64", "damp 0.02", "damp 0.04", "damp 0.08")
    assert factor.damp == 0.08


def test_ladder_clamps_eigenvalues() -> None:
    H = torch.eye(40)
    H[0, 1] = H[1, 0] = 3.0
    factor = InputStatistics(H, 5).factor(0.01)
    assert factor.rungs[-1] == "eigenvalue clamp" and factor.damp == 0.01
    values = torch.linalg.eigvalsh(torch.linalg.inv(factor.upper.double().T @ factor.upper.double()))
    assert values.min() == pytest.approx(0.01, rel=1e-3) and values.max() == pytest.approx(4, rel=1e-3)


def test_ladder_reaches_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.upper_inverse_factor

    def fragile(A: torch.Tensor) -> torch.Tensor:
        if A.dtype == torch.float32:
            raise NotPositiveDefiniteError
        return real(A)

    monkeypatch.setattr(module, "upper_inverse_factor", fragile)
    factor = InputStatistics(torch.eye(10), 5).factor(0.01)
    assert factor.rungs == ("fp64",) and factor.upper.dtype == torch.float32


def test_ladder_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(A: torch.Tensor) -> torch.Tensor:
        raise NotPositiveDefiniteError

    monkeypatch.setattr(module, "upper_inverse_factor", never)
    with pytest.raises(FactorizationError, match=r"tried: fp32, fp64, damp 0.02.*eigenvalue clamp"):
        InputStatistics(torch.eye(10), 5).factor(0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_all_finite(bad: float) -> None:
    x = torch.full((300, 70), 3e38)  # its sum would overflow
    assert module.all_finite(x) and module.all_finite(x[:0])
    x[17, 69] = bad
    assert not module.all_finite(x)
