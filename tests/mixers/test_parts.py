"""Feature maps, decays and specs against their formulas, and the published layers against their papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compressor.methods.linearize_native import NATIVE
from compressor.methods.linearize_settings import LINEARIZE_METHODS
from compressor.mixers.decays import DECAYS, START, Decay, slopes
from compressor.mixers.maps import MAPS, PLAIN, FeatureMap, feature_width, first_weights, running_maximum
from compressor.mixers.spec import MixerSpec, read_spec


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """With random weights in double precision."""
    module = module.double()
    for number, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, seed=number)
    return module


def test_maps_are_their_formulas_head_by_head() -> None:
    x = normal(2, 3, 2, 7, 4)  # (B, Hk, g, T, d)
    for kind in MAPS:
        wide = 4 if kind in PLAIN else 6
        feature_map = filled(FeatureMap(kind, 6, 4, wide))
        with torch.no_grad():
            got = feature_map(x)
            assert torch.equal(feature_map(x.flatten(1, 2)).view_as(got), got)
        for h in range(3):
            for g in range(2):
                one, head = x[:, h, g], 2 * h + g
                if kind == "softmax":
                    wanted = one.softmax(-1)
                elif kind == "unit":
                    wanted = one / one.norm(dim=-1, keepdim=True)
                elif kind == "dense":
                    mixed = x.permute(0, 3, 1, 2, 4).reshape(2, 7, 24) @ feature_map.weight + feature_map.bias
                    wanted = mixed.relu()[..., head * 6 : (head + 1) * 6]
                else:
                    y = one @ feature_map.weight[head]
                    if kind == "hedgehog":
                        wanted = torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)
                    else:
                        wanted = (y + feature_map.bias[head]).relu() if kind == "relu" else y
                assert (got[:, h, g] - wanted).abs().max() < 1e-12, kind


def test_a_tied_map_is_one_for_each_group() -> None:
    x = normal(2, 3, 2, 7, 4)
    tied, own = filled(FeatureMap("relu", 3, 4, 6)), FeatureMap("relu", 6, 4, 6).double()
    own.weight.data, own.bias.data = tied.weight.repeat_interleave(2, 0), tied.bias.repeat_interleave(2, 0)
    assert torch.equal(tied(x), own(x))


@pytest.mark.parametrize(("width", "columns"), [(8, 8), (8, 4), (8, 2), (8, 16), (8, 24), (6, 5)])
def test_maps_start_where_no_channel_is_lost(width: int, columns: int) -> None:
    start = first_weights(width, columns)
    assert start.shape == (width, columns) and torch.linalg.matrix_rank(start) == min(width, columns)
    if columns <= width:
        assert (start.T @ start - torch.eye(columns)).abs().max() < 1e-5
    assert (start.abs().sum(1) > 0).all()


def test_a_dense_map_starts_as_the_identity() -> None:
    x = normal(1, 3, 5, 4).float()
    assert torch.equal(FeatureMap("dense", 3, 4, 4)(x), x.relu())


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), padded=st.integers(0, 6))
def test_a_running_maximum_is_one(seed: int, lengths: list[int], padded: int) -> None:
    """exp(logs) is what the features stand for, whatever the calls; padding counts for nothing."""
    total = sum(lengths)
    logs = 20 * normal(1, 2, total, 3, seed=seed)
    valid = torch.arange(total)[None] >= min(padded, total - 1)
    features, lost, last, start = [], [], None, 0
    for length in lengths:
        at = slice(start, start + length)
        f, kept, last = running_maximum(logs[:, :, at], valid[:, at], last)
        features.append(f)
        lost.append(kept)
        start += length
    all_features, all_lost = torch.cat(features, 2), torch.cat(lost, 2)
    assert (all_features >= 0).all() and (all_features <= 1).all() and (all_lost <= 0).all()
    highest, first = torch.full((1, 2), -50.0, dtype=torch.float64), int(valid.long().argmax())
    for t in range(first, total):
        before, highest = highest, torch.maximum(highest, logs[:, :, t].amax(-1))
        assert (all_features[:, :, t] - (logs[:, :, t] - highest[..., None]).exp()).abs().max() < 1e-12
        assert (all_lost[:, :, t, 0] - (before - highest)).abs().max() < 1e-12
    assert last is not None and torch.equal(last, highest)


@pytest.mark.parametrize("kind", DECAYS)
def test_decays_never_grow_and_start_open(kind: str) -> None:
    hidden, keys = normal(2, 5, 12).float(), normal(2, 3, 5, 4).float()
    decay = Decay(kind, 3, 12, 4, 2)
    log_g = decay(hidden, keys)
    assert log_g.shape in ((2, 3, 5, 1), (2, 3, 5, 4)) and (log_g <= 0).all()
    if kind in ("scalar", "layer", "lowrank", "refined"):
        assert (log_g.mean().exp() - START).abs() < 2e-3
    for extreme in (-1e4, 1e4):
        assert filled(decay).float()(extreme * hidden, extreme * keys).isfinite().all()


def test_decays_are_their_formulas() -> None:
    hidden, keys = normal(2, 5, 12), normal(2, 3, 5, 4)
    assert (Decay("pooled", 3, 12, 4, 0)(hidden, keys).exp() - torch.sigmoid(keys) ** (1 / 16)).abs().max() < 1e-12
    low = filled(Decay("lowrank", 3, 12, 4, 2))
    wanted = torch.sigmoid(hidden @ low.inner.T @ low.outer.T + low.bias) ** (1 / 16)
    assert (low(hidden, keys).exp() - wanted.view(2, 5, 3, 4).transpose(1, 2)).abs().max() < 1e-12
    refined = filled(Decay("refined", 3, 12, 4, 0))
    g, r = torch.sigmoid(hidden @ refined.weight.T + refined.bias), torch.sigmoid(hidden @ refined.refine.T)
    wanted = ((1 - r) * g**2 + r * (1 - (1 - g) ** 2)).view(2, 5, 3, 4).transpose(1, 2)
    assert (refined(hidden, keys).exp() - wanted.clamp_min(1e-6)).abs().max() < 1e-12
    assert slopes(8, hidden).tolist() == pytest.approx([-(2.0**-h) for h in range(1, 9)])
    fixed = Decay("fixed", 8, 12, 4, 0)(hidden, normal(2, 8, 5, 4))
    assert torch.equal(fixed[0, :, 0, 0], slopes(8, hidden)) and fixed.shape == (2, 8, 5, 1)
    layer = filled(Decay("layer", 3, 12, 4, 0))(hidden, keys)
    assert torch.equal(layer[:, 0], layer[:, 2]) and layer.std() > 0


@given(head_dim=st.sampled_from([4, 8, 64, 80, 96, 128]), relative=st.floats(0.01, 8))
def test_widths_are_even(head_dim: int, relative: float) -> None:
    width = feature_width(head_dim, relative)
    assert width % 2 == 0 and width >= 2 and abs(width - head_dim * relative) <= 2


@pytest.mark.parametrize("method", sorted(LINEARIZE_METHODS.keys() - NATIVE.keys()))
def test_specs_are_written_and_read(method: str) -> None:
    spec = LINEARIZE_METHODS[method]().mixer(method, 64)
    assert spec.method == method and read_spec(spec.content()) == spec
    assert spec.map in (*MAPS, "none") and spec.decay in DECAYS
    with pytest.raises(ValueError, match="novelty"):
        read_spec({**spec.content(), "novelty": 1})


def test_the_published_layers_are_those_of_the_papers() -> None:
    def spec(method: str, **more: float) -> MixerSpec:
        return LINEARIZE_METHODS[method](**more).mixer(method, 128)

    lolcats = spec("lolcats")
    assert (lolcats.window, lolcats.sinks, lolcats.features, lolcats.map, lolcats.decay) == (
        64,
        0,
        128,
        "hedgehog",
        "none",
    )
    assert lolcats.exact and lolcats.rope and lolcats.join == "shared"
    liger = spec("liger")
    assert (liger.window, liger.map, liger.decay, liger.normaliser) == (64, "softmax", "pooled", "none")
    assert (liger.window_weight, liger.memory_weight, liger.learn_weights, liger.rope) == (0.5, 0.5, False, False)
    lizard = spec("lizard")
    assert (lizard.window, lizard.sink_logits, lizard.sinks, lizard.decay) == (128, 4, 0, "layer")
    assert not lizard.rope and not lizard.window_rope and lizard.join == "sum" and not lizard.exact
    lawcat = spec("lawcat")
    assert (lawcat.conv, lawcat.tied, lawcat.decay, lawcat.rank, lawcat.rope) == (4, True, "lowrank", 16, False)
    assert lawcat.join == "memory" and spec("lawcat", window=64).exact
    supra = spec("supra")
    assert (supra.map, supra.decay, supra.normaliser, supra.rope_last) == ("dense", "fixed", "group", True)
    regla = spec("regla")
    assert (regla.map, regla.decay, regla.normaliser) == ("exp", "refined", "norm")
    lightning = spec("lightning")
    assert (lightning.map, lightning.decay, lightning.output_gate) == ("unit", "fixed", True)
    assert all(spec(method).window == 0 for method in ("supra", "regla", "lightning", "lawcat"))


def test_published_settings() -> None:
    kept = {name: chosen().keep_attention for name, chosen in LINEARIZE_METHODS.items()}
    assert {name for name, part in kept.items() if part} == {"windowed", "window-sink", "lightning", *NATIVE}
    liger = LINEARIZE_METHODS["liger"]
    assert liger(tokens=100).stages == (0, 100) and liger(tokens=100, train="none").stages == (0, 0)
    assert LINEARIZE_METHODS["supra"]().trained == "full"
    for method, wrong in (("supra", {"train": "all"}), ("lolcats", {"window": 0}), ("regla", {"window": 64}),
                          ("lizard", {"keep_attention": -1}), ("lolcats", {"rate": 2})):  # fmt: skip
        with pytest.raises(ValidationError):
            LINEARIZE_METHODS[method](**wrong)
    base = LINEARIZE_METHODS["windowed"].model_fields["rate"]
    assert base.default == 1e-2 and LINEARIZE_METHODS["lizard"].model_fields["rate"].description == base.description
    assert math.isclose(LINEARIZE_METHODS["lizard"]().lora_rate, 5e-4)
