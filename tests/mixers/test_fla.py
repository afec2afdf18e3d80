"""The memory by kernels of flash-linear-attention, here a plain recurrence in their place, against our operation."""

from __future__ import annotations

from dataclasses import replace

import fla_stand_in
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_reference import Case, random_tokens
from test_chunked import LAYOUTS, SCALE, differentiable, logits, padded

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


def test_features_of_half_precision_are_widened() -> None:
    """Under autocast products come out in bf16; the kernels get what the values have."""
    tokens = random_tokens(Case(rows=2, tokens=300), dtype=torch.float32)
    mixed = replace(tokens, key_features=tokens.key_features.bfloat16())
    found = fla.read_with(fla_stand_in.chunk_simple_gla, mixed, Frame(16, 4, True, True))[0]
    exact = replace(tokens, key_features=mixed.key_features.float())
    assert (
        (found.memory - read_all(exact, Frame(16, 4, True, True))[0].memory).abs() < 0.05 * found.memory.abs().max()
    ).all()
