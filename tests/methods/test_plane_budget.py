"""Planes under a budget: beside all combinations there are."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.methods.plane_budget import choose_planes

matrix = st.tuples(st.integers(1, 20), st.floats(0.01, 10), st.floats(0.05, 0.9), st.floats(0.05, 0.9))


def table(rows: list[tuple[int, float, float, float]]) -> tuple[list[dict[int, float]], list[dict[int, float]]]:
    """Errors that fall with the planes, and bits in proportion to a size."""
    errors = [{1: e, 2: e * a, 3: e * a * b} for _, e, a, b in rows]
    return errors, [{k: 1.7 * k * size for k in (1, 2, 3)} for size, *_ in rows]


@given(st.lists(matrix, min_size=1, max_size=5), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_within_one_upgrade_of_the_best_of_all_combinations(
    rows: list[tuple[int, float, float, float]], share: float
) -> None:
    errors, bits = table(rows)
    low, high = sum(b[1] for b in bits), sum(b[3] for b in bits)
    budget = low + share * (high - low) + 1e-9
    chosen = choose_planes(errors, bits, budget)
    assert sum(b[k] for b, k in zip(bits, chosen, strict=True)) <= budget
    found = sum(e[k] for e, k in zip(errors, chosen, strict=True))
    possible = [
        sum(e[k] for e, k in zip(errors, pick, strict=True))
        for pick in product((1, 2, 3), repeat=len(rows))
        if sum(b[k] for b, k in zip(bits, pick, strict=True)) <= budget
    ]
    largest = max(e[1] - e[3] for e in errors)
    assert min(possible) - 1e-9 <= found <= min(possible) + largest + 1e-9


def test_a_budget_that_fits_everything_gives_everything() -> None:
    errors, bits = table([(3, 1.0, 0.2, 0.2), (5, 2.0, 0.2, 0.2)])
    assert choose_planes(errors, bits, 1e9) == [3, 3]
    assert choose_planes(errors, bits, sum(b[1] for b in bits)) == [1, 1]


def test_planes_go_where_they_spare_more() -> None:
    errors = [{1: 1.0, 2: 0.9, 3: 0.85}, {1: 1.0, 2: 0.2, 3: 0.05}]
    bits = [{1: 10.0, 2: 20.0, 3: 30.0}] * 2
    assert choose_planes(errors, bits, 30) == [1, 2] and choose_planes(errors, bits, 40) == [1, 3]


def test_an_upgrade_over_two_planes_at_once_is_seen() -> None:
    """The second plane alone spares nothing, the third much."""
    errors = [{1: 1.0, 2: 1.0, 3: 0.1}, {1: 1.0, 2: 0.8, 3: 0.7}]
    assert choose_planes(errors, [{1: 1.0, 2: 2.0, 3: 3.0}] * 2, 4) == [3, 1]


def test_planes_that_do_harm_are_not_bought() -> None:
    assert choose_planes([{1: 1.0, 2: 1.5, 3: 2.0}], [{1: 1.0, 2: 2.0, 3: 3.0}], 99) == [1]


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="20 are needed"):
        choose_planes([{1: 1.0}] * 2, [{1: 10.0}] * 2, 19)
