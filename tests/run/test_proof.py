"""The verification table of a linearized model: what it must find, and that every check can fail."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from compressor.hf import linear_attention, linear_cache
from compressor.hf.loading import packed_config_class
from compressor.mixers import chunked
from compressor.mixers.spec import MixerSpec
from compressor.report.schema_linear import DecodeRow
from compressor.run import proof_speed
from compressor.run.proof import ProofSizes, prove, samples
from compressor.run.proof_exact import agreement, exactness, pad_left
from compressor.run.proof_models import greedy, logits_of, window_of
from compressor.run.proof_positions import position_edges, positions, token_losses
from compressor.run.proof_recall import make_trials, recall
from compressor.run.proof_speed import decode, faster_from, smaller_from

SPEC = MixerSpec("windowed", 8, 2, "shared", 8, "hedgehog", "scalar", window_weight=0.3)
SUM = replace(SPEC, join="sum", sinks=0, window_weight=0.5, memory_weight=0.5)
SINKS = MixerSpec("window-sink", 8, 2, "window")


def make_pair(spec: MixerSpec = SPEC, layers: tuple[int, ...] = (0, 1)) -> tuple[Any, Any]:
    """A tiny random teacher, and a student of it whose new parameters are random too."""
    from transformers import AutoModelForCausalLM

    teacher = tiny_models.random_model("llama", scale=0.3, max_position_embeddings=128)
    content = {key: value for key, value in teacher.config.to_dict().items() if key not in ("model_type", "dtype")}
    wanted = {"layers": list(layers), "mixer": spec.content()}
    student = AutoModelForCausalLM.from_config(packed_config_class("llama")(**content, linear_attention=wanted)).eval()
    info = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not info.unexpected_keys
    assert all("lin_" in key for key in info.missing_keys)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lin_" in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return teacher, student


def random_ids(rows: int, length: int, seed: int = 5) -> Tensor:
    return torch.randint(2, tiny_models.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


# exactness


@pytest.mark.parametrize("spec", [SPEC, SINKS])
def test_inside_the_window_the_student_is_the_teacher(spec: MixerSpec) -> None:
    found = exactness(*make_pair(spec), random_ids(6, 40))
    assert (found.by_construction, found.passed, found.tokens, found.texts) == (True, True, 8, 4)
    assert found.to_teacher < found.allowed
    assert found.to_softmax is not None
    assert found.to_softmax < found.allowed


def test_trained_weights_are_held_against_softmax_with_the_same_weights() -> None:
    teacher, student = make_pair()
    with torch.no_grad():
        student.model.layers[0].self_attn.q_proj.weight += 0.3
    found = exactness(teacher, student, random_ids(4, 40))
    assert found.to_teacher > 100 * found.allowed
    assert found.to_softmax is not None
    assert found.to_softmax < found.allowed
    assert found.passed
    assert not any("lin_" in name for name, _ in teacher.named_parameters()), "the teacher is as it was"


def test_weights_of_another_kind_are_not_judged() -> None:
    teacher, student = make_pair()
    for layer in student.model.layers:  # as packed layers, which have no parameter of that name
        weight = layer.mlp.up_proj.weight
        layer.mlp.up_proj = nn.Identity()
        layer.mlp.up_proj.register_buffer("packed", weight.detach())
        layer.mlp.up_proj.forward = lambda x, weight=weight: x @ weight.T
    found = exactness(teacher, student, random_ids(4, 40))
    assert (found.to_softmax, found.passed) == (None, None)
    assert found.to_teacher < found.allowed


def test_a_window_that_is_one_too_short_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = linear_attention.LinearAttention._frame
    monkeypatch.setattr(linear_attention.LinearAttention, "_frame", lambda self: replace(own(self), window=5, sinks=0))
    found = exactness(*make_pair(), random_ids(4, 40))
    assert found.passed is False


def test_what_is_not_exact_by_construction_is_not_judged() -> None:
    found = exactness(*make_pair(SUM), random_ids(4, 40))
    assert (found.by_construction, found.passed) == (False, None)
    assert found.to_teacher > found.allowed


# agreement


@pytest.mark.parametrize("spec", [SPEC, SUM, SINKS])
@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_all_ways_agree(spec: MixerSpec, layers: tuple[int, ...]) -> None:
    rows = agreement(make_pair(spec, layers)[1], random_ids(3, 60), rows=3)
    assert [row.passed for row in rows] == [True] * 4
    assert all(row.difference < row.allowed for row in rows)


def test_a_state_that_is_lost_between_calls_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = linear_cache.LinearState.advance

    def forget(self: Any, tensors: dict[str, Tensor], tokens: int) -> None:
        own(self, {**tensors, "memory": torch.zeros_like(tensors["memory"])}, tokens)

    monkeypatch.setattr(linear_cache.LinearState, "advance", forget)
    rows = agreement(make_pair()[1], random_ids(2, 60))
    assert [row.passed for row in rows] == [False, False, True, False]


def test_a_memory_that_does_not_decay_while_decoding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = chunked._next_state

    def keep(new: Any, *args: Any) -> Any:
        state = own(new, *args)
        return {**state, "memory": state["memory"] * 1.05} if new.keys.shape[2] == 1 else state

    monkeypatch.setattr(chunked, "_next_state", keep)
    rows = agreement(make_pair()[1], random_ids(2, 60))
    assert [row.passed for row in rows][:3] == [False, True, True]


def test_padding_that_enters_the_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_valid(mask: Any, rows: int, tokens: int, device: Any) -> Tensor:
        return torch.ones(rows, tokens, dtype=torch.bool)

    monkeypatch.setattr(linear_attention, "_valid", all_valid)
    rows = agreement(make_pair()[1], random_ids(3, 60), rows=3)
    assert [row.passed for row in rows] == [True, True, False, False]


def test_wrong_positions_while_decoding_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cache.LinearState, "get_seq_length", lambda self: min(self.seen, 1))
    rows = agreement(make_pair()[1], random_ids(2, 60))
    assert [row.passed for row in rows][:3] == [False, False, True]


def test_padded_texts() -> None:
    ids, mask, places = pad_left(torch.tensor([[1, 2, 3], [4, 5, 6]]), [0, 2])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert places.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_greedy_ignores_penalties_and_gives_the_config_back() -> None:
    teacher, _ = make_pair()
    ids = random_ids(1, 12)
    plain = greedy(teacher, ids, 6)
    teacher.generation_config.repetition_penalty = 50.0
    own = teacher.generation_config
    assert torch.equal(greedy(teacher, ids, 6), plain)
    assert teacher.generation_config is own


# perplexity by position


@pytest.mark.parametrize(
    ("window", "length", "edges"),
    [(8, 60, [8, 16, 32, 59]), (8, 33, [8, 16, 32]), (8, 9, [8]), (8, 5, [4]), (64, 512, [64, 128, 256, 511])],
)
def test_edges(window: int, length: int, edges: list[int]) -> None:
    assert position_edges(window, length) == edges


def test_buckets_are_those_of_a_loop() -> None:
    teacher, student = make_pair()
    ids = random_ids(3, 40)
    found = positions(teacher, student, ids, text="noise")
    losses: dict[int, list[float]] = {edge: [] for edge in found.edges}
    for text in ids:
        logs = logits_of(teacher, text[None])[0].detach().double().log_softmax(-1)
        for place in range(1, len(text)):
            edge = next(edge for edge in found.edges if place <= edge)
            losses[edge].append(-float(logs[place - 1, text[place]]))
    assert found.tokens == [len(part) for part in losses.values()]
    own = next(row for row in found.rows if row.who == "teacher")
    expected = [math.exp(sum(part) / len(part)) for part in losses.values()]
    assert own.perplexities == pytest.approx(expected, rel=1e-4)
    every = [loss for part in losses.values() for loss in part]
    assert own.whole == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-4)
    assert [row.who for row in found.rows] == ["teacher", "student", "window", "memory"]
    inside = [row.perplexities[0] for row in found.rows[:3]]
    assert inside == pytest.approx([inside[0]] * 3, rel=1e-3), "what fits the window needs no memory"
    assert all(module.parts == "whole" for module in student.modules() if hasattr(module, "parts"))


def test_a_memory_that_made_the_text_gains_and_a_bad_one_costs() -> None:
    teacher, student = make_pair()
    with torch.no_grad():
        for layer in student.model.layers:
            layer.self_attn.lin_mix.fill_(3.0)  # the window counts little
    text = _sampled(student, rows=8, length=48)
    good = positions(teacher, student, text)
    assert good.gain is not None
    assert good.gain_stderr is not None
    assert good.gain > 3 * good.gain_stderr > 0
    with torch.no_grad():
        for layer in student.model.layers:
            layer.self_attn.lin_q.weight.neg_()
    bad = positions(teacher, student, text)
    assert bad.gain is not None
    assert bad.gain < good.gain - 3 * good.gain_stderr


def _sampled(model: Any, rows: int, length: int) -> Tensor:
    """Texts drawn from the model itself: no other model predicts them better."""
    generator = torch.Generator().manual_seed(11)
    ids = random_ids(rows, 1)
    with torch.no_grad():
        while ids.shape[1] < length:
            odds = logits_of(model, ids)[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(odds, 1, generator=generator)], 1)
    return ids


def test_a_window_alone_has_no_parts() -> None:
    found = positions(*make_pair(SINKS), random_ids(2, 40))
    assert [row.who for row in found.rows] == ["teacher", "student"]
    assert found.gain is None


def test_losses_do_not_depend_on_how_many_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, _ = make_pair()
    ids = random_ids(5, 20)
    whole = token_losses(teacher, ids)
    monkeypatch.setattr("compressor.run.proof_positions.LOGITS_AT_ONCE", 2 * 20 * tiny_models.VOCABULARY)
    assert torch.allclose(token_losses(teacher, ids), whole, atol=1e-5)


# recall


class Copyist(nn.Module):
    """Predicts what followed the last time that the present pair of tokens stood within ``reach`` tokens."""

    def __init__(self, reach: int, context: int = 100) -> None:
        super().__init__()
        self.reach = reach
        self.embedding = nn.Embedding(tiny_models.VOCABULARY, 1)
        text = SimpleNamespace(max_position_embeddings=context, vocab_size=tiny_models.VOCABULARY)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        B, T = input_ids.shape
        logits = torch.zeros(B, T, tiny_models.VOCABULARY)
        for row, text in enumerate(input_ids.tolist()):
            for t in range(max(1, T - logits_to_keep), T):
                for s in range(max(1, t - self.reach), t):
                    if text[s - 1 : s + 1] == text[t - 1 : t + 1]:
                        logits[row, t, text[s + 1]] = 9.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_trials_differ_in_the_first_passage_only() -> None:
    ids = torch.arange(400).view(4, 100)
    texts = make_trials(ids, 6, 10, 40, "natural text", 5, torch.Generator().manual_seed(1))
    assert texts.shown.shape == texts.hidden.shape == (5, 6 + 40 + 10)
    assert torch.equal(texts.shown[:, 6:16], texts.shown[:, 46:])
    assert torch.equal(texts.shown[:, 46:], texts.hidden[:, 46:])
    assert not torch.equal(texts.hidden[:, 6:16], texts.hidden[:, 46:])
    assert torch.equal(texts.shown[:, :6], ids[[0, 1, 2, 3, 0], :6])
    assert torch.equal(texts.shown[:, 16:46], texts.hidden[:, 16:46])
    assert int(texts.shown[:, 16:46].max()) < 300 <= int(texts.shown[:, 46:].min())


def test_a_copyist_recalls_as_far_as_it_sees() -> None:
    student, teacher = Copyist(reach=150), Copyist(reach=600, context=300)
    student.config.linear_attention = {"layers": [0], "mixer": replace(SINKS, window=64).content()}
    found = recall(teacher, student, random_ids(8, 100), distances=(2, 4, 8), cue=3, target=5, trials=3)
    assert found.passage == "random tokens", "a teacher that can is asked for what cannot be guessed"
    rows = {(row.who, row.windows): row for row in found.rows}
    assert rows.keys() == {(who, windows) for who in ("teacher", "student") for windows in (2, 4, 8)}
    for windows in (2, 4, 8):
        assert rows["teacher", windows].gain > 4
        assert rows["teacher", windows].hits == 1
        assert rows["teacher", windows].guessed < 0.2
        assert rows["teacher", windows].distance == 64 * windows
    assert rows["student", 2].gain > 4
    assert abs(rows["student", 4].gain) < 0.1
    assert rows["student", 4].hits < 0.2
    assert [rows["teacher", windows].beyond_context for windows in (2, 4, 8)] == [False, False, True]


def test_a_teacher_that_cannot_copy_is_given_natural_text() -> None:
    teacher, student = make_pair()
    found = recall(teacher, student, random_ids(8, 60), distances=(1, 2, 4), cue=4, target=8, trials=4)
    assert found.passage == "natural text"
    assert {row.windows for row in found.rows} == {2, 4}, "one window has no room for the passage"
    assert {row.who for row in found.rows} == {"teacher", "student", "window"}


# decoding


def test_bytes_of_the_caches() -> None:
    teacher, student = make_pair()
    found = decode(teacher, student, random_ids(2, 50), contexts=(40, 80), steps=3)
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, channels, fp32
    assert [row.teacher_bytes for row in found.rows] == [40 * per_token, 80 * per_token]
    assert found.teacher_bytes_per_token == per_token
    assert found.student_bytes_per_token == 0
    sizes = {row.student_bytes for row in found.rows}
    assert sizes == {2 * found.state_bytes}, "constant"
    assert found.smaller_from is not None
    assert (found.smaller_from - 1) * per_token <= 2 * found.state_bytes < found.smaller_from * per_token
    assert all(row.teacher_ms > 0 < row.student_ms for row in found.rows)


def test_a_kept_layer_goes_on_growing() -> None:
    found = decode(*make_pair(layers=(1,)), random_ids(2, 50), contexts=(40, 80), steps=2)
    assert found.student_bytes_per_token == found.teacher_bytes_per_token / 2


def test_no_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof_speed, "PREFILL", 8)
    found = decode(*make_pair(), random_ids(2, 50), contexts=(40, 80, 160), steps=2, seconds=0.0)
    assert [row.context for row in found.rows] == [40], "never less than the first"
    assert found.skipped == [80, 160]


def _timed(context: int, teacher: float, student: float) -> DecodeRow:
    return DecodeRow(context=context, teacher_ms=teacher, student_ms=student, teacher_bytes=100, student_bytes=50)


def test_where_it_is_faster() -> None:
    assert faster_from([_timed(1, 1, 2), _timed(2, 2, 1), _timed(4, 3, 1)]) == 2
    assert faster_from([_timed(1, 2, 1), _timed(2, 1, 2), _timed(4, 3, 1)]) == 4, "a lucky one does not count"
    assert faster_from([_timed(1, 1, 2)]) is None


def test_where_it_is_smaller() -> None:
    assert smaller_from(_timed(10, 1, 1), 10.0, 0.0) == 6  # 100 - 10 (10 - c) > 50
    assert smaller_from(_timed(10, 1, 1), 10.0, 10.0) is None


# everything


def test_prove() -> None:
    teacher, student = make_pair()
    said: list[str] = []
    sizes = ProofSizes(distances=(4,), trials=2, contexts=(32,), decode_steps=2, steps=6, sample_tokens=5)
    tokenizer = tiny_models.tokenizer()
    found = prove(teacher, student, random_ids(4, 60), tokenizer=tokenizer, text="noise", sizes=sizes, say=said.append)
    assert len(said) == 6
    assert found.left_out == []
    assert found.positions is not None
    assert found.positions.text == "noise"
    assert found.recall is not None
    assert found.decode is not None
    assert len(found.samples) == 2
    assert window_of(student) == 8


def test_what_was_left_out_is_said() -> None:
    sizes = ProofSizes(distances=(), contexts=(), steps=2)
    found = prove(*make_pair(), random_ids(2, 8), sizes=sizes)
    assert found.recall is None
    assert found.decode is None
    assert found.left_out == [
        "the memory: no evaluated text is longer than the window",
        "recall: not asked for",
        "decoding: not asked for",
        "samples: there is no tokenizer",
    ]


def test_samples_of_a_teacher_beside_itself() -> None:
    teacher, student = make_pair()
    tokenizer = tiny_models.tokenizer()
    ids = random_ids(2, 40)
    alike = samples(teacher, teacher, tokenizer, ids, prompts=(4, 16), tokens=6)
    assert all(sample.teacher == sample.student for sample in alike)
    other = samples(teacher, student, tokenizer, ids, prompts=(4, 16), tokens=6)
    assert other[0].teacher == alike[0].teacher
    assert other[1].same < 6
