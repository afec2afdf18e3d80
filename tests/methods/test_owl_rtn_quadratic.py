from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.methods.owl import allocate, outlier_score
from compressor.methods.quadratic import layer_error
from compressor.methods.rtn import bits_for_budget, bits_per_weight, round_to_nearest
from tests.methods import reference
from tests.methods.reference import correlated


def test_outlier_score_counts_entries_far_above_the_mean() -> None:
    W = torch.ones(4, 25)
    W[0, 3] = -50.0
    norms = torch.ones(25)
    norms[7] = 2.0  # 2 / 1.5 is no outlier
    assert outlier_score(W, norms, 5.0) == 0.01
    assert outlier_score(W, norms, 1.01) == 0.05
    assert outlier_score(torch.zeros(3, 3), torch.ones(3)) == 0.0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**9)), min_size=1, max_size=40),
    st.floats(0.05, 0.95),
    st.floats(0, 0.49),
)
def test_allocation_meets_the_target_exactly(blocks: list[tuple[float, int]], sparsity: float, band: float) -> None:
    scores, sizes = [b[0] for b in blocks], [b[1] for b in blocks]
    got = allocate(scores, sparsity, band, sizes)
    mean = math.fsum(g * s for g, s in zip(got, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(sparsity, abs=1e-12)
    assert all(0 < g < 1 for g in got)
    assert max(got) - min(got) <= 2 * band + 1e-9
    order = sorted(range(len(got)), key=lambda i: scores[i])
    assert all(got[a] >= got[b] - 1e-12 for a, b in itertools.pairwise(order))


def test_allocation_as_published() -> None:
    """keep = (1 - s) + stretched - mean(stretched), stretched from 0 to 2 lambda."""
    got = allocate([0.0, 0.25, 1.0], 0.7, 0.08)
    stretched = [0.0, 0.04, 0.16]
    expected = [1 - (0.3 + x - sum(stretched) / 3) for x in stretched]
    assert got == pytest.approx(expected, abs=1e-12)
    assert allocate([1.0, 1.0], 0.7, 0.08) == [0.7, 0.7]
    assert allocate([], 0.7, 0.08) == []
    with pytest.raises(ValueError, match="2 scores, but 1 sizes"):
        allocate([1.0, 2.0], 0.7, 0.08, [3])


def test_layer_error(on_threads: Callable[..., list[tuple[float, float]]]) -> None:
    W, H, _ = correlated(40, 300)
    Q = W * (torch.rand(40, 300, generator=torch.Generator().manual_seed(0)) < 0.5)
    absolute, relative = layer_error(W, Q, H)
    assert absolute == pytest.approx(reference.quadratic(W, Q, H), rel=1e-4)
    assert relative == pytest.approx(absolute / reference.quadratic(W, torch.zeros_like(W), H), rel=1e-4)
    one, two = on_threads(layer_error, W, Q, H)
    assert one == two
    assert layer_error(W, W, H) == (0.0, 0.0)
    assert layer_error(W * 0, W * 0, H) == (0.0, 0.0)
    assert layer_error(W * 0, W, H)[1] == math.inf


@pytest.mark.parametrize("group", [None, 64, 128])
@pytest.mark.parametrize("bits", range(2, 9))
def test_round_to_nearest(bits: int, group: int | None) -> None:
    W, _, _ = correlated(6, 200)
    Q = round_to_nearest(W, bits, group)
    assert Q.shape == W.shape and Q.dtype == torch.float32
    width = group or 200
    for a in range(0, 200, width):
        w, q = W[:, a : a + width], Q[:, a : a + width]
        scale = (w.abs().amax(1, keepdim=True) * 2 / (2**bits - 1)).half().float()
        codes = q / scale
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1
        # fp16 rounds the scale by up to 2^-11, which the outermost code sees 2^(bits-1) times
        assert ((w - q).abs() <= scale * (0.5 + 2**bits / 2**11) + 1e-6).all()
    assert not round_to_nearest(torch.zeros(2, 5), bits, group).any()


def test_bits_for_budget() -> None:
    assert bits_for_budget(9.0, 4096) == (8, 64)
    assert bits_for_budget(8.2, 4096) == (8, 128)
    assert bits_for_budget(8.05, 4096) == (8, None)
    assert bits_for_budget(5.8, 4096) == (5, 64)
    assert bits_for_budget(2.001, 4096) is None
    assert bits_for_budget(4.0, 64) == (3, None)  # a group of 64 is the whole row
    assert bits_per_weight(4, 128, 4096) == 4.125
    assert bits_per_weight(4, 128, 129) == 4 + 32 / 129


@settings(max_examples=100, deadline=None)
@given(st.floats(1.5, 20), st.integers(1, 10_000))
def test_budget_is_kept(bpw: float, n: int) -> None:
    found = bits_for_budget(bpw, n)
    if found is None:
        assert bits_per_weight(2, None, n) > bpw
    else:
        assert bits_per_weight(*found, n) <= bpw
        assert found[0] == 8 or bits_per_weight(found[0] + 1, None, n) > bpw
