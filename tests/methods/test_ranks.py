"""Ranks under a budget: met, monotone, and no worse than what trying everything finds."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.methods.gates import Room, openness
from compressor.methods.ranks import (
    Price,
    Rank,
    at_multiplier,
    capped,
    energy_ranks,
    joint_ranks,
    total,
    uniform_ranks,
    welore_ranks,
)

RULES = [energy_ranks, welore_ranks]


def spectra(shapes: list[tuple[int, int]], seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(min(shape), generator=g, dtype=torch.float64) * 10.0 ** torch.randint(-2, 3, (1,), generator=g))
        .sort(descending=True)
        .values
        for shape in shapes
    ]


def prices(shapes: list[tuple[int, int]]) -> list[Price]:
    return [Price(each=m + n, whole=m * n, count=min(m, n)) for m, n in shapes]


SHAPES = [(64, 64), (16, 64), (172, 64), (64, 172), (64, 64)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("keep", [0.9, 0.8, 0.6, 0.3])
def test_the_budget_is_met_within_half_a_percent(rule: object, keep: float) -> None:
    """On sizes where a component is a small part of the whole."""
    shapes = [(m * 4, n * 4) for m, n in SHAPES]
    offered = prices(shapes)
    whole = sum(price.whole for price in offered)
    for seed in range(5):
        ranks = rule(spectra(shapes, seed), offered, keep * whole)  # type: ignore[operator]
        used = total(ranks, offered) / whole
        assert used <= keep + 1e-12
        assert used >= keep - 0.005 or all(rank is None for rank in ranks)


@pytest.mark.parametrize("rule", RULES)
def test_more_budget_never_means_fewer_components(rule: object) -> None:
    """Of the whole; single matrices may be kept whole instead."""
    offered, values = prices(SHAPES), spectra(SHAPES)
    whole = sum(price.whole for price in offered)
    lost = []
    for keep in (0.2, 0.4, 0.6, 0.8, 0.95):
        ranks = rule(values, offered, keep * whole)  # type: ignore[operator]
        lost.append(loss_of(ranks, values))
    assert lost == sorted(lost, reverse=True)


def loss_of(ranks: list[Rank], values: list[Tensor]) -> float:
    return sum(float(v[r:].sum()) for r, v in zip(ranks, values, strict=True) if r is not None)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(-2.0, 2.0))
def test_no_choice_is_better_for_what_a_multiplier_spends(seed: int, exponent: float) -> None:
    """Against trying everything."""
    shapes = [(5, 4), (4, 6), (6, 6)]
    offered, values = prices(shapes), spectra(shapes, seed)
    ours = at_multiplier(values, offered, 10.0**exponent)
    choices = [[None, *range(1, price.most + 1)] for price in offered]
    spent = total(ours, offered)
    best = min(loss_of(list(c), values) for c in itertools.product(*choices) if total(c, offered) <= spent)
    assert loss_of(ours, values) <= best * (1 + 1e-9) + 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 0.95))
def test_water_filling_is_near_what_trying_everything_finds(seed: int, keep: float) -> None:
    """A budget that no multiplier spends is short by less than one matrix: at worst that much less is kept."""
    shapes = [(5, 4), (4, 6), (6, 6)]
    offered, values = prices(shapes), spectra(shapes, seed)
    budget = keep * sum(price.whole for price in offered)
    ours = energy_ranks(values, offered, budget)
    choices = [[None, *range(1, price.most + 1)] for price in offered]
    less = budget - max(price.whole for price in offered)
    affordable = [loss_of(list(c), values) for c in itertools.product(*choices) if total(c, offered) <= less]
    assert total(ours, offered) <= budget
    assert not affordable or loss_of(ours, values) <= min(affordable) + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(-2.0, 1.0))
def test_stacks_are_chosen_only_where_they_are_cheaper(seed: int, exponent: float) -> None:
    """Never both ways at once, within the budget, and no worse than apart but for what is left of the budget."""
    shapes = [(5, 6), (3, 6), (6, 6), (8, 6)]  # the last one is the first two, stacked
    offered, values = prices(shapes), spectra(shapes, seed)
    spent = total(at_multiplier(values[:3], offered[:3], 10.0**exponent), offered[:3])
    ours = joint_ranks(values, offered, spent, [([0, 1], 3)])
    assert (ours[3] == 0) == (ours[0] != 0) == (ours[1] != 0) and ours[2] != 0
    live = [i for i in range(4) if ours[i] != 0]
    assert total([ours[i] for i in live], [offered[i] for i in live]) <= spent
    lost = loss_of([ours[i] for i in live], [values[i] for i in live])
    assert lost <= loss_of(energy_ranks(values[:3], offered[:3], spent), values[:3]) + float(values[3].sum())


def test_matrices_that_no_rank_makes_smaller_stay_whole() -> None:
    assert capped(3, Price(10, 30, 9)) is None
    assert capped(2, Price(10, 30, 9)) == 2
    assert Price(10, 30, 9).most == 2
    assert uniform_ranks([Price(2, 1, 1), Price(8, 16, 4)], 0.9 * 17) == [None, 1]


def test_uniform_ranks_are_the_published_ones() -> None:
    """floor(m n share / (m + n)), SVD-LLM's."""
    offered = prices(SHAPES)
    budget = 0.8 * sum(price.whole for price in offered)
    assert uniform_ranks(offered, budget) == [int(m * n * 0.8 / (m + n)) for m, n in SHAPES]


def test_welore_keeps_what_stands_out() -> None:
    """A spectrum with few large values is cut, a flat one is not: it falls below the threshold late or never."""
    steep = torch.tensor([10.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0]).double()
    flat = torch.ones(8).double()
    ranks = welore_ranks([steep, flat], [Price(16, 64, 8), Price(16, 64, 8)], 96)
    assert ranks[1] is None and ranks[0] is not None and ranks[0] <= 2


@pytest.mark.parametrize("count", [4, 40])
def test_gates_are_differentiable_and_rise(count: int) -> None:
    position = torch.tensor(count / 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: (openness(p, count) * weights).sum(), (position,))
    opened = torch.stack([openness(torch.tensor(float(p)), count) for p in range(count + 1)])
    assert bool((opened.diff(dim=0) >= 0).all()) and bool((opened.diff(dim=1) <= 0).all())
    assert bool((opened.sum(1).diff() > 0.3).all())


def test_positions_are_moved_onto_the_budget_and_rise_with_it() -> None:
    offered = prices(SHAPES)
    whole = sum(price.whole for price in offered)
    before = None
    for keep in (0.3, 0.5, 0.7):
        room = Room(offered, keep * whole)
        shares = room.project(torch.tensor([0.9, 0.1, 0.5, 0.5, 0.0]))
        used = sum(float(s) * price.count * price.each for s, price in zip(shares, offered, strict=True))
        assert used == pytest.approx(keep * whole, rel=1e-4)
        ranks = room.ranks(shares)
        assert total(ranks, offered) <= keep * whole
        assert total(ranks, offered) >= (keep - 0.01) * whole
        if before is not None:
            assert bool((shares >= before - 1e-6).all())
        before = shares
