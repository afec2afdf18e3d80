"""Every pruning method: what they have in common, then each against its slow reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressor.errors import UserError
from compressor.methods import masks
from compressor.methods.quadratic import layer_error
from compressor.methods.settings import AdmmSettings, MagnitudeSettings, SparseGPTSettings, WandaSettings
from compressor.methods.table import METHODS, InputStatistics, Pruned, solve
from tests.methods import reference
from tests.methods.reference import correlated

NAMES = sorted(METHODS)


def stats_of(H: Tensor, tokens: int) -> InputStatistics:
    return InputStatistics(H, tokens)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(("m", "n"), [(1, 8), (5, 24), (60, 200), (130, 72)])
@pytest.mark.parametrize("target", ["50%", "71%", "2:4", "3:8"])
def test_counts_are_exact_and_zeros_stand_outside_the_mask(name: str, refit: bool, m: int, n: int, target: str) -> None:
    W, H, tokens = correlated(m, n)
    before = W.clone()
    pattern = target if ":" in target else None
    sparsity = None if pattern else float(target[:-1]) / 100
    settings = METHODS[name].settings(sparsity=sparsity, pattern=pattern, refit=refit)
    pruned = METHODS[name].solve(W, stats_of(H, tokens), settings, sparsity)
    assert torch.equal(W, before)
    assert pruned.weight.dtype == torch.float32 and pruned.mask.dtype == torch.bool
    assert pruned.weight.is_contiguous() and pruned.mask.is_contiguous()
    assert pruned.weight.shape == pruned.mask.shape == W.shape
    assert not pruned.weight[~pruned.mask].any() and torch.isfinite(pruned.weight).all()
    assert not torch.signbit(pruned.weight[~pruned.mask]).any()
    assert pruned.codes is None and pruned.notes == ()
    if settings.group is not None:
        kept, group = settings.group
        assert (pruned.mask.view(m, -1, group).sum(2) == kept).all()
    elif name == "wanda":
        assert ((~pruned.mask).sum(1) == masks.count(sparsity or 0, n)).all()
    else:
        assert int((~pruned.mask).sum()) == masks.count(sparsity or 0, m * n)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [0.6, "2:4"])
def test_frozen_zeros_stay_and_count(name: str, target: float | str) -> None:
    W, H, tokens = correlated(40, 160)
    frozen = torch.rand(40, 160, generator=torch.Generator().manual_seed(5)) < 0.35
    W = W.masked_fill(frozen, 0)
    given = {"pattern": target} if isinstance(target, str) else {"sparsity": target}
    settings = METHODS[name].settings(refit=True, **given)
    pruned = solve(name, W, stats_of(H, tokens), settings, frozen=frozen)
    assert not pruned.weight[frozen].any()
    if isinstance(target, str):
        assert (pruned.mask.view(40, -1, 4).sum(2) == 2).all()
    else:
        assert not pruned.mask[frozen].any()
        assert int((~pruned.mask).sum()) == masks.count(target, W.numel())


@pytest.mark.parametrize("name", NAMES)
def test_more_frozen_than_asked_prunes_nothing_more(name: str) -> None:
    W, H, tokens = correlated(30, 64)
    frozen = torch.zeros(30, 64, dtype=torch.bool)
    frozen[:, ::2] = True
    settings = METHODS[name].settings(sparsity=0.3)
    pruned = solve(name, W.masked_fill(frozen, 0), stats_of(H, tokens), settings, frozen=frozen)
    assert torch.equal(pruned.mask, ~frozen)


@pytest.mark.parametrize("name", NAMES)
def test_dead_inputs_go_first(name: str) -> None:
    W, H, tokens = correlated(20, 50)
    dead = torch.zeros(50, dtype=torch.bool)
    dead[[0, 7, 49]] = True
    H[dead] = 0
    H[:, dead] = 0
    pruned = solve(name, W, stats_of(H, tokens), METHODS[name].settings(sparsity=0.5))
    assert torch.isfinite(pruned.weight).all()
    if name == "wanda":
        assert not pruned.mask[:, dead].any()
    if name == "sparsegpt":
        assert not pruned.weight[:, dead].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [0.5, "2:4"])
def test_same_bits_on_one_and_two_threads(
    name: str, target: float | str, on_threads: Callable[..., list[Pruned]]
) -> None:
    W, H, tokens = correlated(401, 104)
    given = {"pattern": target} if isinstance(target, str) else {"sparsity": target}
    settings = METHODS[name].settings(refit=True, **given)
    one, two = on_threads(lambda: solve(name, W, stats_of(H, tokens), settings))
    assert torch.equal(one.weight, two.weight) and torch.equal(one.mask, two.mask)


@pytest.mark.parametrize("name", NAMES)
def test_without_statistics(name: str) -> None:
    W, _, _ = correlated(20, 40)
    pruned = solve(name, W, None, METHODS[name].settings(sparsity=0.5, refit=True))
    assert torch.equal(pruned.weight, solve("magnitude", W, None, MagnitudeSettings()).weight)
    assert pruned.notes


def test_needs_data() -> None:
    assert not MagnitudeSettings().needs_data
    assert MagnitudeSettings(refit=True).needs_data
    assert MagnitudeSettings(allocation="owl").needs_data
    assert WandaSettings().needs_data


def test_bad_calls() -> None:
    W, H, tokens = correlated(4, 10)
    with pytest.raises(UserError, match=r"no pruning method is called 'wnda'.*did you mean 'wanda'"):
        solve("wnda", W, None, WandaSettings())
    with pytest.raises(TypeError, match="wanda takes WandaSettings"):
        solve("wanda", W, None, MagnitudeSettings())
    with pytest.raises(ValueError, match="does not belong"):
        solve("wanda", W[:, :5], stats_of(H, tokens), WandaSettings())
    W[1, 2] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        solve("magnitude", W, None, MagnitudeSettings())
    for name in NAMES:
        with pytest.raises(UserError, match="does not divide"):
            solve(name, torch.ones(4, 10), stats_of(H, tokens), METHODS[name].settings(pattern="2:4"))


def test_magnitude_takes_the_smallest() -> None:
    W, _, _ = correlated(9, 31)
    pruned = solve("magnitude", W, None, MagnitudeSettings(sparsity=0.4))
    entries = [(float(w), 0.0, i) for i, w in enumerate(W.abs().flatten())]
    expected = set(reference.smallest(entries, masks.count(0.4, 9 * 31)))
    assert set((~pruned.mask).flatten().nonzero().flatten().tolist()) == expected
    assert torch.equal(pruned.weight, W * pruned.mask)


def test_wanda_takes_the_smallest_of_each_row() -> None:
    W, H, tokens = correlated(9, 31)
    pruned = solve("wanda", W, stats_of(H, tokens), WandaSettings(sparsity=0.4))
    for i in range(9):
        scores = [(float(W[i, j].abs() * H[j, j].sqrt()), 0.0, j) for j in range(31)]
        expected = sorted(reference.smallest(scores, masks.count(0.4, 31)))
        assert (~pruned.mask[i]).nonzero().flatten().tolist() == expected
    assert torch.equal(pruned.weight, W * pruned.mask)


@pytest.mark.parametrize(("m", "n", "block"), [(7, 90, 32), (33, 128, 128), (20, 150, 64), (1, 40, 1)])
def test_sparsegpt_matches_the_plain_loop(m: int, n: int, block: int) -> None:
    W, H, tokens = correlated(m, n)
    pruned = solve("sparsegpt", W, stats_of(H, tokens), SparseGPTSettings(sparsity=0.55, block=block, refit=False))
    free = [m * min(block, n - a) for a in range(0, n, block)]
    counts = masks.tile_counts(masks.count(0.55, m * n), free)
    Q, keep = reference.sparsegpt(W, reference.published_factor(H, 0.01), counts=counts, block=block)
    assert torch.equal(pruned.mask, keep)
    assert torch.allclose(pruned.weight.double(), Q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("m", "n", "pattern"), [(7, 96, (2, 4)), (11, 80, (4, 8)), (5, 60, (2, 3)), (4, 96, (7, 32))])
def test_sparsegpt_n_of_m_matches_the_plain_loop(m: int, n: int, pattern: tuple[int, int]) -> None:
    W, H, tokens = correlated(m, n)
    settings = SparseGPTSettings(pattern=f"{pattern[0]}:{pattern[1]}", block=40, refit=False)
    pruned = solve("sparsegpt", W, stats_of(H, tokens), settings)
    Q, keep = reference.sparsegpt(W, reference.published_factor(H, 0.01), pattern=pattern)
    assert torch.equal(pruned.mask, keep)
    assert torch.allclose(pruned.weight.double(), Q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("target", [0.5, "2:4"])
@pytest.mark.parametrize("data", [True, False])
def test_joint_quantization(bits: int, target: float | str, data: bool) -> None:
    W, H, tokens = correlated(30, 120)
    W[3] = 0  # a row without a range
    W[4] = W[4].abs()  # a row on one side of zero
    given = {"pattern": target} if isinstance(target, str) else {"sparsity": target}
    stats = stats_of(H, tokens) if data else None
    pruned = solve("sparsegpt", W, stats, SparseGPTSettings(bits=bits, **given))
    grid = pruned.codes
    assert grid is not None and grid.bits == bits
    assert grid.codes.dtype == torch.uint8 and int(grid.codes.max()) < 2**bits
    assert torch.equal(grid.scale.half().float(), grid.scale) and (grid.scale > 0).all()
    decoded = (grid.codes.float() - grid.zero.float()[:, None]) * grid.scale[:, None]
    assert torch.equal(decoded, pruned.weight)
    if not isinstance(target, str):
        assert int((~pruned.mask).sum()) == 1800  # weights that round to zero stay in the mask


def test_joint_quantization_beats_rounding_afterwards() -> None:
    W, H, tokens = correlated(60, 200)
    joint = solve("sparsegpt", W, stats_of(H, tokens), SparseGPTSettings(bits=3))
    alone = solve("sparsegpt", W, stats_of(H, tokens), SparseGPTSettings(refit=False))
    assert joint.codes is not None
    scale, zero = joint.codes.scale[:, None], joint.codes.zero.float()[:, None]
    rounded = (((alone.weight / scale).round() + zero).clamp(0, 7) - zero) * scale * alone.mask
    assert layer_error(W, joint.weight, H)[0] < layer_error(W, rounded, H)[0]


@pytest.mark.parametrize("given", [{"sparsity": 0.7}, {"sparsity": 0.5}, {"pattern": "2:4"}])
def test_order_of_the_methods(given: dict[str, float | str]) -> None:
    """On correlated inputs: magnitude > wanda > sparsegpt > sparsegpt + refit > admm."""
    W, H, tokens = correlated(128, 256)
    stats = stats_of(H, tokens)
    errors = [
        layer_error(W, solve(name, W, stats, METHODS[name].settings(refit=refit, **given)).weight, H)[1]
        for name, refit in [("magnitude", False), ("wanda", False), ("sparsegpt", False), ("sparsegpt", True)]
    ]
    errors.append(layer_error(W, solve("admm", W, stats, AdmmSettings(**given)).weight, H)[1])
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[-2]


def test_admm_says_when_it_did_not_settle() -> None:
    W, H, tokens = correlated(30, 64)
    pruned = solve("admm", W, stats_of(H, tokens), AdmmSettings(iterations=4))
    assert "4 iterations" in pruned.notes[0]
    assert int((~pruned.mask).sum()) == 960


def test_admm_restarts_when_the_penalty_never_lets_the_mask_move() -> None:
    W, H, tokens = correlated(30, 64)
    strict = solve("admm", W, stats_of(H, tokens), AdmmSettings(rho=1e6))
    assert strict.notes == ()
    best = layer_error(W, solve("admm", W, stats_of(H, tokens), AdmmSettings()).weight, H)[0]
    assert layer_error(W, strict.weight, H)[0] < 1.5 * best


def test_failed_rungs_are_noted() -> None:
    H = torch.eye(40)
    H[0, 1] = H[1, 0] = 1.05
    pruned = solve("sparsegpt", torch.ones(3, 40), stats_of(H, 5), SparseGPTSettings())
    assert pruned.notes == ("the Hessian needed: fp64, damp 0.02, damp 0.04, damp 0.08",)
