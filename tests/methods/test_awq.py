"""AWQ: the search never ends up with more loss than plain rounding, and finds scales where there are outliers."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor

from compressor.methods import awq, round_nearest
from compressor.methods.quantize_settings import AwqSettings, RtnSettings
from compressor.methods.statistics import InputStatistics, NonFiniteHessianError

GRIDS = [
    {"bits": 3, "group": 16},
    {"bits": 4, "group": "row"},
    {"bits": 2, "group": 8, "asymmetric": True},
    {"bits": 3, "group": 16, "clip": False},
]


def outliers(seed: int) -> tuple[Tensor, Tensor, int]:
    """A problem in which a few inputs are much larger than the others."""
    weight, hessian, tokens = reference.correlated(24, 32, seed)
    sizes = torch.ones(32)
    sizes[[3, 17, 30]] = 20.0
    return weight, hessian * sizes * sizes[:, None], tokens


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_no_row_loses_more_than_by_plain_rounding(grid: dict[str, object], seed: int) -> None:
    weight, hessian, tokens = outliers(seed)
    fitted = awq.solve(weight, InputStatistics(hessian, tokens), AwqSettings(**grid)).code.dense()
    plain = round_nearest.solve(weight, None, RtnSettings(**grid)).code.dense()
    for row in range(len(weight)):
        part = slice(row, row + 1)
        ours = reference.quadratic(weight[part], fitted[part], hessian)
        assert ours <= reference.quadratic(weight[part], plain[part], hessian) * (1 + 1e-4)


@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_scales_never_lose_and_outliers_are_scaled_up(grid: dict[str, object], seed: int) -> None:
    weight, hessian, _ = outliers(seed)
    settings = AwqSettings(**grid)
    readers = [awq.Reader(weight[:16], settings), awq.Reader(weight[16:], settings)]
    exponents = awq.find_scales(readers, hessian, torch.arange(32), 20)
    found, none = (_loss(readers, hessian, e) for e in (exponents, torch.zeros(32)))
    assert found <= none * (1 + 1e-6)
    assert found == pytest.approx(awq.loss_under(readers, hessian, exponents), rel=1e-3)
    if settings.bits > 2:
        rest = exponents[torch.tensor([j not in (3, 17, 30) for j in range(32)])]
        assert found < 0.97 * none
        assert exponents[[3, 17, 30]].mean() > rest.mean()


def _loss(readers: list[awq.Reader], hessian: Tensor, exponents: Tensor) -> float:
    """What is lost, in terms of the weights and inputs as they were."""
    s = torch.exp2(exponents)
    total = 0.0
    for reader in readers:
        statistics = InputStatistics(hessian / s / s[:, None], 1)
        scaled = awq.solve(reader.weight * s, statistics, reader.settings).code.dense()  # type: ignore[arg-type]
        total += reference.quadratic(reader.weight, scaled / s, hessian)
    return total


def test_inputs_of_one_source_share_a_scale() -> None:
    weight, hessian, _ = outliers(0)
    source = torch.arange(8).repeat(4)
    exponents = awq.find_scales([awq.Reader(weight, AwqSettings(bits=3))], hessian, source, 20)
    assert exponents.shape == (8,)
    assert exponents.any()


def test_dead_inputs_keep_the_scale_one() -> None:
    weight, hessian, _ = outliers(0)
    hessian[5], hessian[:, 5], weight[:, 6] = 0, 0, 0
    for exponents in awq.exponents_of([awq.Reader(weight, AwqSettings())], hessian, torch.arange(32), 20):
        assert exponents.isfinite().all()
        assert exponents[5] == exponents[6] == 0


def test_the_published_family() -> None:
    weight, hessian, tokens = outliers(1)
    x, w = InputStatistics(hessian, tokens).norms().double(), weight.abs().amax(0).double()
    found = list(awq.exponents_of([awq.Reader(weight, AwqSettings())], hessian, torch.arange(32), 4))
    assert len(found) == 4
    for number, exponents in enumerate(found, 1):
        a = number / 4
        expected = x**a if number % 2 == 0 else x**a / w ** (1 - a)
        expected = (expected / (expected.max() * expected.min()).sqrt()).log2()
        torch.testing.assert_close(exponents.double(), expected, rtol=1e-4, atol=1e-4)


def test_hessians_of_no_use_are_refused() -> None:
    weight, hessian, _ = outliers(0)
    hessian[0, 0] = float("nan")
    with pytest.raises(NonFiniteHessianError):
        awq.solve(weight, InputStatistics(hessian, 1), AwqSettings())
