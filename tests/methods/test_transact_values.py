# ruff: noqa: E741  (O, the output projection)
"""Values: closed forms against brute force, fits against least squares over tokens, turns that never lose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import correlated
from torch import Tensor

from compressor.methods import transact_values
from compressor.methods.narrowing import (
    expand_output,
    expand_values,
    narrow_values_of,
    project_columns,
)
from compressor.methods.transact_values import improve, narrow_values, value_bases


def wide(bases: Tensor, heads: int) -> Tensor:
    """The block diagonal matrix of every head's basis."""
    shared = heads // len(bases)
    return torch.block_diag(*[basis for basis in bases for _ in range(shared)])


def cut(bases: Tensor, width: int) -> Tensor:
    return bases[:, :, :width].contiguous()


def by_variance(H: Tensor, kv_heads: int, dim: int, width: int) -> Tensor:
    """The baseline: the directions in which values vary most."""
    blocks = H.double().reshape(kv_heads, -1, dim, kv_heads, len(H) // dim // kv_heads, dim)
    sums = torch.stack([sum(blocks[g, h, :, g, h] for h in range(blocks.shape[1])) for g in range(kv_heads)])
    return torch.linalg.eigh(sums).eigenvectors.flip(2)[:, :, :width].float().contiguous()


def apart(kv_heads: int, shared: int, dim: int, *, alike: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """O (10, heads dim) and an H in which no head knows of another; ``alike``: all heads of a group have the same."""
    g = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(kv_heads):
        made = [torch.randn(4 * dim, dim, generator=g) @ torch.randn(dim, dim, generator=g) for _ in range(shared)]
        blocks += [made[0] if alike else x for x in made]
    H = torch.block_diag(*[x.T @ x for x in blocks])
    return torch.randn(10, len(H), generator=g), H


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("width", [1, 3, 5])
def test_heads_that_know_nothing_of_each_other_have_a_closed_form(shared: int, width: int) -> None:
    O, H = apart(2, shared, 6, alike=True)
    bases, worths = value_bases(O, H, 2, 6, damp=1e-7)
    found = narrow_values(O, H, cut(bases, width), damp=1e-7)
    exact = 0.0  # all heads of a group, one below the other: the best matrix of low rank behind a whitening
    for g in range(2):
        heads = range(g * shared, (g + 1) * shared)
        spans = [slice(h * 6, h * 6 + 6) for h in heads]
        L = torch.linalg.cholesky(H[spans[0], spans[0]].double())
        stacked = torch.cat([O[:, span].double() @ L for span in spans])
        exact += float(torch.linalg.svdvals(stacked)[width:].square().sum())
    assert found.loss == pytest.approx(exact, rel=1e-3)
    assert float(worths[:, width:].sum()) == pytest.approx(exact, rel=1e-3)
    assert improve(O, H, cut(bases, width), damp=1e-7).loss == pytest.approx(exact, rel=1e-3)


def test_the_refit_is_least_squares_over_the_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    z, O = torch.randn(120, 24, generator=g) @ torch.randn(24, 24, generator=g), torch.randn(7, 24, generator=g)
    bases = torch.linalg.qr(torch.randn(2, 6, 4, generator=g)).Q
    found = narrow_values(O, z.T @ z, bases, damp=1e-7)
    seen = z @ wide(bases, 4)
    exact = torch.linalg.lstsq(seen.double(), (z @ O.T).double()).solution.T
    torch.testing.assert_close(found.output.double(), exact, rtol=1e-3, atol=1e-3)
    error = float((z @ O.T - seen @ found.output.T).double().square().sum())
    assert found.loss == pytest.approx(error, rel=1e-4)
    torch.testing.assert_close(project_columns(O, bases), O @ wide(bases, 4))
    torch.testing.assert_close(expand_output(found.output, bases), found.output @ wide(bases, 4).T)


@pytest.mark.parametrize("shared", [1, 2])
def test_turns_come_close_to_the_best_of_all_subspaces(shared: int) -> None:
    """Two key-value heads of two dimensions keep one each: every pair of angles is tried. Heads that share values can
    leave the turns in a local optimum."""
    angles = torch.arange(40) * math.pi / 40
    lines = torch.stack([angles.cos(), angles.sin()], 1)[:, :, None]
    excess = []
    for seed in range(4):
        O, H, _ = correlated(9, 4 * shared, seed)
        tried = min(narrow_values(O, H, torch.stack([a, b])).loss for a in lines for b in lines)
        excess.append(improve(O, H, cut(value_bases(O, H, 2, 2)[0], 1), turns=30).loss / tried)
    assert sorted(excess)[1] < 1.01 and max(excess) < (1.01 if shared == 1 else 1.25)


@pytest.mark.parametrize("seed", range(3))
def test_better_than_by_variance_and_best_with_turns(seed: int) -> None:
    O, H, _ = correlated(20, 48, seed)
    variance = narrow_values(O, H, by_variance(H, 3, 8, 5)).loss
    start = cut(value_bases(O, H, 3, 8)[0], 5)
    closed = narrow_values(O, H, start).loss
    turned = [improve(O, H, start, turns=turns).loss for turns in (0, 1, 3, 8)]
    assert closed < variance
    assert turned[0] == closed and turned == sorted(turned, reverse=True) and turned[-1] < 0.9 * closed


def test_repeated_steps_solve_for_the_subspaces_exactly() -> None:
    """Against one dense linear system over all key-value heads."""
    O, H, _ = correlated(9, 12)
    now = narrow_values(O, H, cut(value_bases(O, H, 2, 3)[0], 2))
    shift = 0.01 * float(H.diagonal().mean())
    A, P = H.double() + shift * torch.eye(12, dtype=torch.float64), now.output.double()
    units = []  # O' E of every unit E
    for unknown in range(12):
        E = torch.zeros(12, dtype=torch.float64)
        E[unknown] = 1
        units.append(P @ wide(E.reshape(2, 2, 3).transpose(1, 2), 4).T)
    gram = torch.stack([torch.stack([((X @ A) * Y).sum() for Y in units]) for X in units])
    right = torch.stack([((O.double() @ A) * X).sum() for X in units])
    exact = torch.linalg.solve(gram, right).reshape(2, 2, 3)
    for _ in range(20):
        now = replace(now, bases=transact_values._step(O, H, now, shift).transpose(1, 2).contiguous())
    torch.testing.assert_close(now.bases.transpose(1, 2).double(), exact, rtol=1e-4, atol=1e-5)


layouts = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.booleans())


@given(layouts, st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_never_worse_than_no_refit(layout: tuple[int, int, int, int, bool], width: int, seed: int) -> None:
    """Heads with values of their own and shared ones, few tokens, a dead dimension."""
    kv_heads, shared, dim, tokens, dead = layout
    width = min(width, dim)
    g = torch.Generator().manual_seed(seed)
    z, O = (
        torch.randn(tokens, kv_heads * shared * dim, generator=g),
        torch.randn(6, kv_heads * shared * dim, generator=g),
    )
    if dead:
        z[:, 0] = 0
    H = z.T @ z
    bases, worths = value_bases(O, H, kv_heads, dim)
    torch.testing.assert_close(
        bases.transpose(1, 2) @ bases, torch.eye(dim).expand(kv_heads, -1, -1), atol=1e-5, rtol=0
    )
    assert bool((worths.diff(dim=1) <= 0).all())
    plain = narrow_values(O, H, cut(bases, width), compensate=False)
    fitted = narrow_values(O, H, cut(bases, width))
    turned = improve(O, H, cut(bases, width))
    assert bool(torch.isfinite(turned.output).all())
    assert turned.loss <= fitted.loss <= plain.loss * (1 + 1e-5) + 1e-5
    if width == dim:
        assert turned.relative_loss < 1e-9


def test_expanded_attention_gives_what_narrow_attention_gives() -> None:
    """Grouped heads, values with a bias."""
    g = torch.Generator().manual_seed(3)
    kv_heads, shared, dim, width, tokens = 2, 3, 4, 3, 50
    x, V, bias = (torch.randn(*s, generator=g) for s in ((tokens, 9), (kv_heads * dim, 9), (kv_heads * dim,)))
    O = torch.randn(9, kv_heads * shared * dim, generator=g)
    mixing = torch.randn(kv_heads * shared, tokens, tokens, generator=g).softmax(-1)

    def mixed(V: Tensor, bias: Tensor) -> Tensor:
        values = (x @ V.T + bias).reshape(tokens, kv_heads, -1).repeat_interleave(shared, 1).transpose(0, 1)
        return (mixing @ values).transpose(0, 1).reshape(tokens, -1)

    z = mixed(V, bias)
    narrow = improve(O, z.T @ z, cut(value_bases(O, z.T @ z, kv_heads, dim)[0], width))
    small_V, small_bias = narrow_values_of(V, narrow.bases), narrow_values_of(bias, narrow.bases)
    assert small_V.shape == (kv_heads * width, 9) and small_bias.shape == (kv_heads * width,)
    expected = mixed(small_V, small_bias) @ narrow.output.T
    big_V, big_bias = expand_values(small_V, narrow.bases), expand_values(small_bias, narrow.bases)
    assert big_V.shape == V.shape and big_bias.shape == bias.shape
    expanded = mixed(big_V, big_bias) @ expand_output(narrow.output, narrow.bases).T
    torch.testing.assert_close(expanded, expected, rtol=1e-4, atol=1e-4)
    error = float((expanded - z @ O.T).double().square().sum())
    assert narrow.loss == pytest.approx(error, rel=1e-3)


def test_one_token_needs_one_dimension() -> None:
    g = torch.Generator().manual_seed(1)
    z, O = torch.randn(1, 24, generator=g), torch.randn(6, 24, generator=g)
    start = cut(value_bases(O, z.T @ z, 2, 6)[0], 1)
    assert narrow_values(O, z.T @ z, start, damp=1e-6).relative_loss < 1e-6


def test_the_same_on_any_number_of_threads(on_threads: Callable[..., list[Any]]) -> None:
    O, H, _ = correlated(96, 128)

    def solve() -> list[Tensor]:
        found = improve(O, H, cut(value_bases(O, H, 4, 16)[0], 12))
        return [found.bases, found.output]

    one, two = on_threads(solve)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
