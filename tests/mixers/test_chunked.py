"""The chunked operation against its definition: layouts, padding, calls with a state, gradients, long texts."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_reference import Case, random_tokens, reference
from torch import Tensor

from compressor.mixers.chunked import (
    Frame,
    Read,
    State,
    Tokens,
    join_shared,
    memory_output,
    read_all,
    window_output,
)

SCALE = 0.5
DECAYS = ("none", "scalar", "vector")
LAYOUTS = [  # window, sinks, older
    (window, sinks, older) for window in (0, 1, 8, 33) for sinks in (0, 3) for older in (True, False)
]


def padded(tokens: int) -> Tensor:
    """One whole row, one padded on the left, one on the right: (3, tokens)."""
    valid = torch.ones(3, tokens, dtype=torch.bool)
    valid[1, :9] = False
    valid[2, -11:] = False
    return valid


@cache
def case_tokens(decay: str) -> Tokens:
    return random_tokens(Case(decay=decay), padded(41), seed=DECAYS.index(decay))


@cache
def logits() -> Tensor:
    return torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@cache
def expected(decay: str, window: int, sinks: int, older: bool, with_logits: bool = False) -> tuple[Tensor, ...]:
    frame = Frame(window, sinks, older, older)
    return reference(case_tokens(decay), frame, SCALE, logits() if with_logits else None)


def agree(read: Read, wanted: tuple[Tensor, ...], valid: Tensor, tolerance: float = 1e-10) -> None:
    """Compare what queries that are no padding read, relative to the size of the memory."""
    for got, value, weight in ((read.window, *wanted[:2]), (read.memory, *wanted[2:4])):
        both = torch.cat([value, weight[..., None]], -1)
        apart = (got - both).abs() / (1 + both.abs())
        assert apart.amax((1, 2, 4))[valid].max() < tolerance
    assert (read.top[..., 0] - wanted[4]).abs().amax((1, 2))[valid].max() < tolerance


def in_calls(tokens: Tokens, frame: Frame, lengths: list[int], chunk: int = 64, logits: Tensor | None = None) -> Read:
    """Read with several calls of so many tokens each, and one with the rest."""
    reads, state, start = [], None, 0
    for length in [*lengths, tokens.keys.shape[2] - sum(lengths)]:
        if length:
            read, state = read_all(
                tokens.span(start, start + length), frame, state, chunk=chunk, scale=SCALE, sink_logits=logits
            )
            reads.append(read)
            start += length
    return Read(*(torch.cat([getattr(r, name) for r in reads], -2) for name in ("window", "memory", "top")))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("window", "sinks", "older"), LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_every_layout_reads_what_the_definition_says(
    decay: str, window: int, sinks: int, older: bool, chunk: int
) -> None:
    tokens, frame = case_tokens(decay), Frame(window, sinks, older, older)
    read, _ = read_all(tokens, frame, chunk=chunk, scale=SCALE)
    agree(read, expected(decay, window, sinks, older), tokens.valid)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("window", "sinks", "older"), LAYOUTS)
def test_several_calls_are_as_one(decay: str, window: int, sinks: int, older: bool) -> None:
    tokens, frame = case_tokens(decay), Frame(window, sinks, older, older)
    wanted = expected(decay, window, sinks, older)
    agree(in_calls(tokens, frame, [20, 1, 1, 7]), wanted, tokens.valid)
    agree(in_calls(tokens, frame, [3, 2, 1, 30], chunk=7), wanted, tokens.valid)


@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize("older", [True, False])
def test_sink_logits_enlarge_the_denominator_only(window: int, older: bool) -> None:
    tokens, frame = case_tokens("scalar"), Frame(window, 3, older, older)
    wanted = expected("scalar", window, 3, older, True)
    for chunk in (1, 7, 64):
        agree(in_calls(tokens, frame, [20, 1, 1, 7], chunk, logits()), wanted, tokens.valid)
    plain = in_calls(tokens, frame, [])
    with_logits = in_calls(tokens, frame, [], logits=logits())
    assert (window_output(with_logits).abs() <= window_output(plain).abs() + 1e-12).all()


def test_the_joins_are_those_of_the_docstring() -> None:
    tokens, share = case_tokens("scalar"), torch.rand(2, 2, 1, 1, dtype=torch.float64)
    older = read_all(tokens, Frame(8, 3, True, True), chunk=7, scale=SCALE)[0]
    near, near_weight, far, far_weight, _ = expected("scalar", 8, 3, True)
    valid = tokens.valid[:, None, None, :, None]
    shared = (near + share * far) / (near_weight + share[..., 0] * far_weight)[..., None]
    assert (join_shared(older, share.log()) - shared).mul(valid).abs().nan_to_num().max() < 1e-10
    whole = read_all(tokens, Frame(8, 3, False, False), chunk=7, scale=SCALE)[0]
    near, near_weight, far, far_weight, _ = expected("scalar", 8, 3, False)
    for got, wanted in (
        (window_output(whole), near / near_weight[..., None]),
        (memory_output(whole, "sum"), far / far_weight[..., None]),
        (memory_output(whole, "none"), far),
        (memory_output(whole, "norm"), far / (far.square().mean(-1, keepdim=True) + 1e-6).sqrt()),
    ):
        assert (got - wanted).nan_to_num().mul(valid).abs().max() < 1e-10


def test_a_long_enough_window_is_softmax_attention() -> None:
    tokens = random_tokens(Case(rows=2, tokens=20))
    read, _ = read_all(tokens, Frame(20, 0, True, True), chunk=6, scale=SCALE)
    B, Hk, g, T, d = tokens.queries.shape
    softmax = torch.nn.functional.scaled_dot_product_attention(
        tokens.queries.reshape(B, Hk * g, T, d),
        tokens.keys.repeat_interleave(g, 1),
        tokens.values.repeat_interleave(g, 1),
        is_causal=True,
        scale=SCALE,
    ).view(B, Hk, g, T, -1)
    assert (join_shared(read, torch.tensor(-1.2, dtype=torch.float64)) - softmax).abs().max() < 1e-12
    assert not read.memory.any()


def test_padding_changes_nothing() -> None:
    """A row alone, and in a batch behind padding or before it: the same numbers."""
    case, frame = Case(rows=1, tokens=30, decay="vector"), Frame(6, 2, True, True)
    alone = random_tokens(case)
    read, _ = read_all(alone, frame, chunk=8, scale=SCALE)
    for before, after in ((5, 0), (17, 0), (0, 12), (3, 4)):
        wider = random_tokens(Case(rows=1, tokens=before + 30 + after, decay="vector"), seed=5)
        at = slice(before, before + 30)
        for name in ("queries", "keys", "values", "query_features", "key_features", "log_decay"):
            getattr(wider, name)[..., at, :] = getattr(alone, name)
        wider.valid[:] = False
        wider.valid[:, at] = True
        got = in_calls(wider, frame, [7, 1, 1, 9], chunk=8)
        assert (got.window[..., at, :] - read.window).abs().max() < 1e-12
        assert (got.memory[..., at, :] - read.memory).abs().max() < 1e-10


def differentiable(tokens: Tokens) -> tuple[Tokens, list[Tensor]]:
    leaves = [
        getattr(tokens, name).clone().requires_grad_()
        for name in ("queries", "keys", "values", "query_features", "key_features", "log_decay")
    ]
    return Tokens(*leaves[:3], tokens.valid, *leaves[3:]), leaves


@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("older", [True, False])
def test_gradients_are_those_of_the_definition(decay: str, older: bool) -> None:
    frame = Frame(5, 2, older, older)
    plain = random_tokens(Case(decay=decay, tokens=25), padded(25), seed=3)
    direction = torch.randn(3, 2, 2, 25, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direction = direction * plain.valid[:, None, None, :, None]

    def total(near: Tensor, near_weight: Tensor, far: Tensor, far_weight: Tensor, top: Tensor) -> Tensor:
        near_part = (near.sum(-1) + near_weight) * direction[..., 0]
        top_part = (top * near_weight).cos() * direction[..., 0]
        return (near_part + top_part + (far.sum(-1) + far_weight.sin()) * direction[..., 1]).sum()

    first, second = differentiable(plain), differentiable(plain)
    extra = [logits().clone().requires_grad_() for _ in range(2)]
    total(*reference(first[0], frame, SCALE, extra[0])).backward()
    read = in_calls(second[0], frame, [11, 1], chunk=6, logits=extra[1])
    window, memory = read.window, read.memory
    total(window[..., :-1], window[..., -1], memory[..., :-1], memory[..., -1], read.top[..., 0]).backward()
    for slow, fast in zip([*first[1], extra[0]], [*second[1], extra[1]], strict=True):
        assert slow.grad is not None and fast.grad is not None and slow.grad.any()
        assert ((slow.grad - fast.grad).abs() / (1 + slow.grad.abs())).max() < 1e-9


def test_gradcheck() -> None:
    tokens = random_tokens(Case(rows=1, kv_heads=1, tokens=6, width=2, value_width=1, features=2, decay="vector"))
    whole, leaves = differentiable(tokens)

    def outputs(*parts: Tensor) -> Tensor:
        read, _ = read_all(Tokens(*parts[:3], whole.valid, *parts[3:]), Frame(2, 1, True, True), chunk=4)
        return join_shared(read, parts[0].new_tensor(-1.2))

    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("older", [True, False])
def test_a_later_token_changes_nothing_before_it(decay: str, older: bool) -> None:
    tokens, frame = case_tokens(decay), Frame(8, 3, older, older)
    before, _ = read_all(tokens, frame, chunk=7, scale=SCALE)
    other = random_tokens(Case(decay=decay), padded(41), seed=99)
    mixed = Tokens(*[
        torch.cat([getattr(tokens, n)[:, :25], getattr(other, n)[:, 25:]], 1)
        if n == "valid"
        else torch.cat([getattr(tokens, n)[..., :25, :], getattr(other, n)[..., 25:, :]], -2)
        for n in Tokens.__dataclass_fields__
    ])  # fmt: skip
    after, _ = read_all(mixed, frame, chunk=7, scale=SCALE)
    for old, new in ((before.window, after.window), (before.memory, after.memory)):
        assert torch.equal(old[..., :25, :], new[..., :25, :])
        assert not torch.equal(old[..., 25:, :], new[..., 25:, :])


@pytest.mark.parametrize(("decay", "chunk"), [("scalar", 64), ("vector", 32)])
@pytest.mark.parametrize("older", [True, False])
def test_long_texts_in_single_precision_stay_in_bounds(decay: str, chunk: int, older: bool) -> None:
    """64K tokens, gates between wide open and shut: a weighted mean of values never leaves their range."""
    case = Case(rows=1, kv_heads=1, group=1, tokens=65536, width=2, value_width=1, features=2, decay=decay)
    tokens = random_tokens(case, dtype=torch.float32)
    gates = torch.tensor([0.0, -1e-7, -1e-3, -20.0, -1e4])
    picks = torch.randint(0, 5, tokens.log_decay.shape, generator=torch.Generator().manual_seed(2))
    picks[..., 20000:50000, :] = 0  # a memory that only grows
    tokens = Tokens(*[getattr(tokens, n) for n in list(Tokens.__dataclass_fields__)[:-1]], gates[picks])
    with torch.no_grad():
        read, state = read_all(tokens, Frame(8, 4, older, older), chunk=chunk)
    assert all(tensor.isfinite().all() for tensor in state.values())
    limit = tokens.values.abs().max() * 1.0001
    joined = join_shared(read, torch.tensor(2.3)) if older else memory_output(read, "sum")
    for out in (joined, window_output(read)):
        assert out.isfinite().all() and (out.abs() <= limit).all()


def test_a_state_has_a_constant_size() -> None:
    def sizes(state: State) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in state.items()}

    tokens, state, seen = case_tokens("vector"), None, []
    for i in range(41):
        _, state = read_all(tokens.span(i, i + 1), Frame(8, 3, True, True), state)
        seen.append(sizes(state))
    assert seen[7] == seen[40] != seen[5]
    assert seen[40]["keys"] == (3, 2, 7, 4)  # a window of 8 counts the query's own token
    assert seen[40] == sizes(read_all(tokens, Frame(8, 3, True, True))[1])


def test_a_state_is_not_changed() -> None:
    tokens = case_tokens("scalar")
    _, state = read_all(tokens.span(0, 20), Frame(8, 3, True, True))
    kept = {name: tensor.clone() for name, tensor in state.items()}
    read_all(tokens.span(20, 41), Frame(8, 3, True, True), state)
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_layout_any_padding_any_calls(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 16))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    valid = torch.tensor([data.draw(flags), data.draw(flags)])
    older = data.draw(st.booleans())
    frame = Frame(data.draw(st.integers(0, 6)), data.draw(st.integers(0, 3)), older, older)
    case = Case(2, 1, data.draw(st.integers(1, 2)), length, 2, 1, 2, data.draw(st.sampled_from(DECAYS)))
    tokens = random_tokens(case, valid, seed=data.draw(st.integers(0, 5)))
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=3)))
    lengths = [stop - start for start, stop in zip([0, *cuts], cuts, strict=False)]
    read = in_calls(tokens, frame, lengths, chunk=data.draw(st.integers(1, 20)))
    agree(read, reference(tokens, frame, SCALE), valid) if valid.any() else None
    assert read.window.isfinite().all() and read.memory.isfinite().all()
