"""The memory by kernels of flash-linear-attention, here a plain recurrence in their place, against our operation."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import fla_stand_in
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_reference import Case, random_tokens
from test_chunked import LAYOUTS, SCALE, differentiable, logits, padded
from torch import Tensor

from compressor.mixers import fla
from compressor.mixers.chunked import Frame, Read, State, Tokens, read_all

DECAYS = ("none", "scalar", "vector")
PARTS = ("window", "memory", "top")


def kernel(decay: str) -> fla.Kernel:
    return fla_stand_in.chunk_gla if decay == "vector" else fla_stand_in.chunk_simple_gla


def agree(found: tuple[Read, State], wanted: tuple[Read, State], tolerance: float = 1e-10) -> None:
    """What is read, padded queries included, and every tensor of the state."""
    pairs = [(getattr(found[0], name), getattr(wanted[0], name)) for name in PARTS]
    assert found[1].keys() == wanted[1].keys()
    pairs += [(found[1][name], tensor) for name, tensor in wanted[1].items()]
    for got, tensor in pairs:
        assert got.shape == tensor.shape and got.dtype == tensor.dtype
        if tensor.dtype in (torch.bool, torch.int64):
            assert torch.equal(got, tensor)
        elif tensor.numel():
            assert ((got - tensor).abs() / (1 + tensor.abs())).max() < tolerance


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("window", "sinks", "older"), LAYOUTS)
def test_every_layout_in_calls_of_either_kind(decay: str, window: int, sinks: int, older: bool, group: int) -> None:
    """Each call takes a state from a call of either kind: kernels read the prompt, ours what is generated."""
    tokens = random_tokens(Case(decay=decay, tokens=61, group=group), padded(61))
    frame, start = Frame(window, sinks, older, older), 0
    state: State | None = None
    for length in (1, 30, 2, 20, 8):
        new = tokens.span(start, start + length)
        wanted = read_all(new, frame, state, chunk=7, scale=SCALE)
        found = fla.read_with(kernel(decay), new, frame, state, scale=SCALE)
        agree(found, wanted)
        start, state = start + length, found[1]
    whole = read_all(tokens, frame, chunk=64, scale=SCALE)
    agree(fla.read_with(kernel(decay), tokens, frame, scale=SCALE), whole)
    assert state is not None and ((state["memory"] - whole[1]["memory"]).abs() < 1e-9).all()


@pytest.mark.parametrize("older", [True, False])
def test_sink_logits_are_the_windows(older: bool) -> None:
    tokens, frame = random_tokens(Case(tokens=50), padded(50)), Frame(8, 3, older, older)
    found = fla.read_with(fla_stand_in.chunk_simple_gla, tokens, frame, scale=SCALE, sink_logits=logits())
    agree(found, read_all(tokens, frame, scale=SCALE, sink_logits=logits()))


@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize(("window", "sinks", "older"), [(5, 2, True), (5, 2, False), (0, 0, False), (1, 0, True)])
def test_gradients_are_ours(decay: str, window: int, sinks: int, older: bool) -> None:
    """Through what is read and through the state, over two calls."""
    plain, frame = random_tokens(Case(decay=decay, tokens=40), padded(40), seed=3), Frame(window, sinks, older, older)
    gradients = []
    for by_kernel in (True, False):
        tokens, leaves = differentiable(plain)
        state, total = None, torch.zeros((), dtype=torch.float64)
        for start, stop in ((0, 25), (25, 40)):
            new = tokens.span(start, stop)
            read, state = (
                fla.read_with(kernel(decay), new, frame, state) if by_kernel else read_all(new, frame, state, chunk=9)
            )
            total = total + sum(getattr(read, name).sin().sum() for name in PARTS)
        total = total + state["memory"].sin().sum()
        gradients.append(torch.autograd.grad(total, leaves, allow_unused=True))
    for got, wanted in zip(*gradients, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            assert ((got - wanted).abs() / (1 + wanted.abs())).max() < 1e-9


def test_decays_over_long_texts_keep_their_digits() -> None:
    """Single precision, 8000 tokens that all but shut the memory: the sum of logarithms reaches 4000."""
    case = Case(rows=1, kv_heads=1, group=1, tokens=8000, width=2, value_width=1, features=2)
    exact = random_tokens(case)
    single = Tokens(*(x if x.dtype == torch.bool else x.float() for x in vars(exact).values()))
    frame = Frame(64, 0, True, True)
    wanted = read_all(exact, frame)[0].memory
    with torch.no_grad():
        found = fla.read_with(fla_stand_in.chunk_simple_gla, single, frame)[0].memory
    assert ((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
    last = wanted[..., -1000:, :]
    assert ((found[..., -1000:, :] - last).abs().max() / last.abs().max()) < 1e-5


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_layout_any_padding_any_calls(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 20))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    valid = torch.tensor([data.draw(flags), data.draw(flags)])
    older, decay = data.draw(st.booleans()), data.draw(st.sampled_from(DECAYS))
    frame = Frame(data.draw(st.integers(0, 6)), data.draw(st.integers(0, 3)), older, older)
    tokens = random_tokens(Case(2, 1, data.draw(st.integers(1, 2)), length, 2, 1, 2, decay), valid)
    cut = data.draw(st.integers(0, length - 1))
    state = read_all(tokens.span(0, cut), frame, scale=SCALE)[1] if cut else None
    new = tokens.span(cut, length)
    agree(
        fla.read_with(kernel(decay), new, frame, state, scale=SCALE),
        read_all(new, frame, state, chunk=data.draw(st.integers(1, 20)), scale=SCALE),
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that looks like one with a GPU and with flash-linear-attention."""
    fla.proved_kernel.cache_clear()
    monkeypatch.delenv(fla.FLA_VARIABLE, raising=False)
    monkeypatch.setattr(fla, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(fla, "find_spec", lambda name: object())
    fla_stand_in.install(monkeypatch)
    yield monkeypatch
    fla.proved_kernel.cache_clear()


def singles(tokens: int = 300, **settings: Any) -> Tokens:
    return random_tokens(Case(rows=2, tokens=tokens, **settings), dtype=torch.float32)


class Counted:
    """A kernel that counts its calls, and may change what the stand-in returns."""

    def __init__(self, kernel: Any, change: float = 0.0) -> None:
        self.kernel, self.change, self.calls = kernel, change, 0

    def __call__(self, **given: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        read, state = self.kernel(**given)
        return read * (1 + self.change), state


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_kernels_are_used_where_they_agree(gpu: Any, decay: str, caplog: pytest.LogCaptureFixture) -> None:
    counted = Counted(kernel(decay))
    fla_stand_in.install(gpu, **{kernel(decay).__name__: counted})
    tokens, frame = singles(decay=decay), Frame(16, 4, True, True)
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "compressor"):
        found = [fla.read_tokens(tokens, frame, scale=SCALE, coarse=True) for _ in range(3)]
    assert counted.calls == 4  # one of them to prove it
    assert [record.levelname for record in caplog.records] == ["INFO"] and "used" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)
    wanted = read_all(tokens, frame, scale=SCALE)
    agree(found[0], wanted, 1e-3)
    assert not torch.equal(found[0][0].memory, wanted[0].memory)


def test_kernels_are_proved_in_inference_mode_and_when_learning(gpu: Any) -> None:
    counted = Counted(fla_stand_in.chunk_simple_gla)
    fla_stand_in.install(gpu, chunk_simple_gla=counted)
    with torch.inference_mode():
        assert fla.kernel_for(singles()) is counted
    learning = singles()
    learning.key_features.requires_grad_()
    assert fla.kernel_for(learning) is counted
    assert counted.calls == 2


@pytest.mark.parametrize("change", [0.1, float("nan")])
def test_kernels_that_compute_something_else_are_not_used(
    gpu: Any, change: float, caplog: pytest.LogCaptureFixture
) -> None:
    fla_stand_in.install(gpu, chunk_simple_gla=Counted(fla_stand_in.chunk_simple_gla, change))
    assert fla.kernel_for(singles()) is None and fla.kernel_for(singles()) is None
    assert len(caplog.records) == 1 and "not used, its outputs" in caplog.text


def test_kernels_with_wrong_gradients_are_used_for_inference_only(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(**given: Any) -> Any:
        return fla_stand_in.chunk_simple_gla(**{**given, "k": given["k"] * 0.8 + given["k"].detach() * 0.2})

    fla_stand_in.install(gpu, chunk_simple_gla=wrong)
    assert fla.kernel_for(singles()) is wrong
    learning = singles()
    learning.values.requires_grad_()
    assert fla.kernel_for(learning) is None
    with torch.no_grad():
        assert fla.kernel_for(learning) is wrong
    assert "not used, its gradients" in caplog.text


def test_kernels_that_fail_are_not_used(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    def broken(**given: Any) -> Any:
        raise RuntimeError("0 active drivers ([]). There should only be one.\nand more")

    fla_stand_in.install(gpu, chunk_simple_gla=broken)
    tokens, frame = singles(), Frame(16, 4, True, True)
    for _ in range(2):
        agree(fla.read_tokens(tokens, frame, coarse=True), read_all(tokens, frame), 1e-12)
    assert [record.getMessage() for record in caplog.records] == [
        "flash-linear-attention: chunk_simple_gla, 5 features, inference: not used, it fails "
        "(RuntimeError: 0 active drivers ([]). There should only be one.)"
    ]


def test_ours_is_used_everywhere_else(gpu: Any) -> None:
    assert fla.kernel_for(singles()) is not None
    assert fla.kernel_for(singles(tokens=fla.FLA_FEWEST - 1)) is None
    assert fla.kernel_for(singles(features=0)) is None
    assert fla.kernel_for(random_tokens(Case(tokens=300))) is None  # double precision
    counted = Counted(fla_stand_in.chunk_simple_gla)
    gpu.setattr(fla, "kernel_for", lambda tokens: counted)
    fla.read_tokens(singles(), Frame(16, 4, True, True))  # a model that computes in fp32
    assert not counted.calls


def test_the_environment_variable_chooses(gpu: Any) -> None:
    gpu.setenv(fla.FLA_VARIABLE, "off")
    assert fla.kernel_for(singles()) is None
    gpu.setenv(fla.FLA_VARIABLE, "yes")
    with pytest.raises(ValueError, match="COMPRESSOR_FLA=yes: expected auto or off"):
        fla.kernel_for(singles())


def test_without_a_gpu_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str) -> Any:
        raise AssertionError(name)

    monkeypatch.setattr(fla, "import_module", never)
    monkeypatch.setattr(fla, "find_spec", never)
    tokens = singles()
    agree(fla.read_tokens(tokens, Frame(16, 4, True, True), coarse=True), read_all(tokens, Frame(16, 4, True, True)))


def test_without_the_package_ours_is_used_and_nothing_said(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    gpu.setattr(fla, "find_spec", lambda name: None)
    assert fla.kernel_for(singles()) is None
    assert not caplog.records


def test_features_of_half_precision_are_widened(gpu: Any) -> None:
    """Under autocast products come out in bf16; the kernels get what the values have."""
    tokens = singles()
    mixed = replace(tokens, key_features=tokens.key_features.bfloat16())
    found = fla.read_with(fla_stand_in.chunk_simple_gla, mixed, Frame(16, 4, True, True))[0]
    exact = replace(tokens, key_features=mixed.key_features.float())
    assert (
        (found.memory - read_all(exact, Frame(16, 4, True, True))[0].memory).abs() < 0.05 * found.memory.abs().max()
    ).all()
