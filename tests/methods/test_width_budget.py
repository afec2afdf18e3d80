"""Widths under a budget: beside all combinations there are."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import correlated

from compressor.methods.transact import eliminate
from compressor.methods.width_budget import WidthCurve, filled_widths, mlp_curve, uniform_widths, value_curve

module = st.tuples(st.integers(1, 9), st.lists(st.floats(0.01, 5), min_size=4, max_size=4))


def curves(rows: list[tuple[int, list[float]]]) -> list[WidthCurve]:
    """Convex falling losses over widths 1 to 5."""
    made = []
    for price, steps in rows:
        losses = {5: 0.0}
        for width, step in zip((4, 3, 2, 1), sorted(steps), strict=True):
            losses[width] = losses[width + 1] + step
        made.append(WidthCurve(losses, price))
    return made


def total(modules: list[WidthCurve], widths: list[int]) -> tuple[float, int]:
    pairs = list(zip(modules, widths, strict=True))
    return sum(curve.losses[width] for curve, width in pairs), sum(curve.price * width for curve, width in pairs)


@given(st.lists(module, min_size=1, max_size=4), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_within_one_step_of_the_best_of_all_combinations(rows: list[tuple[int, list[float]]], share: float) -> None:
    modules = curves(rows)
    low, high = (sum(curve.price * width for curve in modules) for width in (1, 5))
    budget = int(low + share * (high - low))
    loss, price = total(modules, filled_widths(modules, budget))
    assert price <= budget
    tried = [total(modules, list(pick)) for pick in product(range(1, 6), repeat=len(modules))]
    best = min(loss for loss, price in tried if price <= budget)
    assert best - 1e-9 <= loss <= best + max(max(steps) for _, steps in rows) * len(rows) + 1e-9


def test_modules_of_one_name_have_one_width() -> None:
    modules = curves([(3, [1, 2, 3, 4]), (1, [0.1, 0.1, 0.1, 0.1]), (3, [0.1, 0.2, 0.3, 0.4])])
    widths = filled_widths(modules, 25, ["mlp", "values", "mlp"])
    assert widths[0] == widths[2] and total(modules, widths)[1] <= 25
    free = filled_widths(modules, 25)
    assert free[0] > free[2]
    assert total(modules, free)[0] < total(modules, widths)[0]


def test_a_budget_for_everything_changes_nothing_and_one_for_nothing_is_refused() -> None:
    modules = curves([(3, [1, 2, 3, 4]), (2, [1, 1, 1, 1])])
    assert filled_widths(modules, 25) == [5, 5]
    assert filled_widths(modules, 5) == [1, 1]
    with pytest.raises(ValueError, match="needed"):
        filled_widths(modules, 4)


@pytest.mark.parametrize(("share", "expected"), [(1.0, 20), (0.8, 16), (0.79, 12), (0.01, 4)])
def test_uniform_widths_are_multiples_within_the_share(share: float, expected: int) -> None:
    W, H, _ = correlated(6, 20)
    curve = mlp_curve(eliminate(W, H, 16), 20, price=18, unit=2.0, multiple=4)
    assert sorted(curve.losses) == [4, 8, 12, 16, 20]
    assert uniform_widths([curve], share) == [expected]


def test_curves_say_what_narrowing_costs() -> None:
    W, H, _ = correlated(6, 10)
    found = eliminate(W, H, 9)
    curve = mlp_curve(found, 10, price=1, unit=2.0)
    assert curve.losses[10] == 0 and curve.losses[7] == pytest.approx(float(found.losses[3]) / 2)
    values = value_curve(torch.tensor([[5.0, 3.0, 1.0], [4.0, 2.0, 0.5]]), price=7, unit=0.5)
    assert values.losses == {3: 0.0, 2: 3.0, 1: 13.0} and values.full == 3


def test_a_width_that_is_no_multiple_stays_possible() -> None:
    curve = mlp_curve(eliminate(*correlated(6, 10)[:2], 9), 10, price=1, unit=1.0, multiple=4)
    assert sorted(curve.losses) == [4, 8, 10]
