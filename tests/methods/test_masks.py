from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import UserError
from compressor.methods import masks
from tests.methods.reference import smallest

few = settings(max_examples=60, deadline=None)
small_values = st.integers(0, 3)  # many ties


@st.composite
def tied(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    rows, n = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    values = st.lists(small_values, min_size=rows * n, max_size=rows * n)
    score = torch.tensor(draw(values), dtype=torch.float32).view(rows, n)
    magnitude = torch.tensor(draw(values), dtype=torch.float32).view(rows, n)
    return score, magnitude, draw(st.integers(0, n))


@few
@given(tied())
def test_smallest_is_exact_and_breaks_ties_as_documented(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    score, magnitude, k = case
    got = masks.smallest(score, magnitude, k)
    for row in range(len(score)):
        entries = [(float(s), float(w), i) for i, (s, w) in enumerate(zip(score[row], magnitude[row], strict=True))]
        assert got[row].nonzero().flatten().tolist() == sorted(smallest(entries, k))


@few
@given(tied())
def test_partition_and_sort_agree(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    score, magnitude, k = case
    if k:
        assert torch.equal(masks._by_partition(score, magnitude, k), masks._by_sort(score, magnitude, k))


@few
@given(st.floats(0.01, 0.99), st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_tile_counts_add_up_and_fit(sparsity: float, free: list[int]) -> None:
    pruned = masks.count(sparsity, sum(free))
    counts = masks.tile_counts(pruned, free)
    assert sum(counts) == pruned
    for c, size in zip(counts, free, strict=True):
        assert 0 <= c <= size
        assert abs(c - (pruned * size / sum(free) if sum(free) else 0)) <= 1


def test_count_rounds_to_nearest() -> None:
    assert masks.count(0.29, 100) == 29  # 0.29 * 100 is a hair below 29
    assert masks.count(0.5, 5) == 3
    assert masks.count(0.001, 10) == 0


@pytest.mark.parametrize(("m", "n", "sparsity"), [(1, 1, 0.4), (7, 33, 0.5), (64, 48, 0.7), (5, 100, 0.013)])
def test_exact_counts(m: int, n: int, sparsity: float) -> None:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(1))
    drop = masks.count(sparsity, m * n)
    assert int((~masks.keep_exactly(W.abs(), W, drop, None)).sum()) == drop
    per_row = masks.count(sparsity, n)
    assert ((~masks.keep_rows(W.abs(), W, per_row, None)).sum(1) == per_row).all()


def test_frozen_weights_go_first_and_count() -> None:
    W = torch.arange(1.0, 13).view(2, 6)
    frozen = torch.zeros(2, 6, dtype=torch.bool)
    frozen[1, 4:] = True  # the largest two
    mask = masks.keep_exactly(W, W, 4, frozen)
    assert (~mask).nonzero().tolist() == [[0, 0], [0, 1], [1, 4], [1, 5]]
    assert not (masks.keep_exactly(W, W, 1, frozen) & frozen).any()
    assert (~masks.keep_rows(W, W, 3, frozen)).nonzero()[:, 1].tolist() == [0, 1, 2, 0, 4, 5]


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4), (3, 4), (16, 32), (1, 2)])
def test_pattern_keeps_exactly_n_of_m(kept: int, group: int) -> None:
    W = torch.randint(-2, 3, (9, 64), generator=torch.Generator().manual_seed(2)).float()  # many ties and zeros
    frozen = torch.rand(9, 64, generator=torch.Generator().manual_seed(3)) < 0.6
    for still in (None, frozen):
        mask = masks.keep_pattern(W.abs(), W, kept, group, still)
        assert (mask.view(9, -1, group).sum(2) == kept).all()
    weights = W.masked_fill(frozen, 0).abs() * mask
    by_hand = W.masked_fill(frozen, 0).abs().view(9, -1, group).sort(2, descending=True).values[:, :, :kept].sum()
    assert weights.sum() == by_hand


def test_pattern_must_divide() -> None:
    W = torch.ones(2, 10)
    with pytest.raises(UserError, match=r"2:4 does not divide a weight with 10 inputs.*--exclude"):
        masks.keep_pattern(W, W, 2, 4)
