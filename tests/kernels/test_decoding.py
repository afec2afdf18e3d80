"""Models that decode with the kernels' attention and a cache that grows in place, against transformers alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import integer_models
import pytest
import repacked
import tiny_models
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import compressor
from compressor.hf import decoding
from compressor.hf.caches import cache_name, read_on
from compressor.hf.decoding import MARK, GrowingLayer, quicken
from compressor.kernels.native import LEVELS, Native

COMMON = {"hidden_size": 64, "intermediate_size": 96}
WIDE: dict[str, dict[str, Any]] = {  # heads of 16, which the kernels have
    **{family: COMMON | {"head_dim": 16} for family in ("llama", "mistral", "qwen3", "gemma3")},
    "neox": COMMON,
    "gpt2": {"n_embd": 64},
}


def packed(family: str, folder: Path) -> Path:
    """A model in fp32 with trits in its layers."""
    source = tiny_models.save(tiny_models.random_model(family, **WIDE[family]), folder / "source")
    return repacked.repack(source, folder / "packed", lambda _, weight: integer_models.trits(weight, 32, planes=2))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations as they are: what is compared differs by attention alone."""
    monkeypatch.setenv("COMPRESSOR_ACTIVATIONS", "exact")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of keys in calls of the kernels' attention."""
    calls: list[tuple[int, ...]] = []
    real = decoding.attention

    def attention(q: Tensor, k: Tensor, *more: Any) -> Tensor:
        calls.append(tuple(k.shape))
        return real(q, k, *more)

    monkeypatch.setattr(decoding, "attention", attention)
    return calls


def prompts() -> dict[str, Tensor]:
    """Two rows, one of them padded on the left."""
    ids = tiny_models.random_ids(2)[:, :12].clone()
    seen = torch.ones_like(ids)
    ids[0, :5], seen[0, :5] = 1, 0
    return {"input_ids": ids, "attention_mask": seen}


def generated(model: Any, **how: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and logits (tokens, rows, vocabulary) before each of them."""
    out = model.generate(
        **prompts(), max_new_tokens=14, do_sample=False, min_new_tokens=14, output_logits=True,
        return_dict_in_generate=True, **how,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


HOW: dict[str, dict[str, Any]] = {
    "dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True}, "beams": {"num_beams": 3},
}  # fmt: skip


@pytest.mark.usefixtures("by_the_package", "kernels", "exact")
@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("how", HOW)
def test_generate(family: str, how: str, tmp_path: Path, counted: list[tuple[int, ...]]) -> None:
    """As with attention and cache of transformers alone, but for rounding."""
    model = AutoModelForCausalLM.from_pretrained(packed(family, tmp_path))
    found = generated(model, **HOW[how])
    layers = model.config.num_hidden_layers
    assert len(counted) == 13 * layers  # of 14 tokens, the first is of the prompt
    quicken(model, "packed")
    want = generated(model, **HOW[how])
    assert len(counted) == 13 * layers
    assert torch.equal(found[0], want[0])
    torch.testing.assert_close(found[1], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("by_the_package", "kernels")
def test_the_cache_of_generate_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever name models have for it."""
    added: list[int] = []
    real = decoding._Room.add
    monkeypatch.setattr(decoding._Room, "add", lambda room, more: added.append(more.shape[-2]) or real(room, more))
    model = AutoModelForCausalLM.from_pretrained(packed("llama", tmp_path))
    generated(model)
    assert len(added) == 14 * 2 * model.config.num_hidden_layers and added.count(1) == 13 * len(added) // 14


@pytest.mark.usefixtures("by_the_package", "kernels", "exact")
def test_guesses_that_are_taken_back(tmp_path: Path, counted: list[tuple[int, ...]]) -> None:
    """Prompt lookup crops the cache; several tokens at a time are PyTorch's."""
    model = AutoModelForCausalLM.from_pretrained(packed("llama", tmp_path))
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
    found = [
        model.generate(ids, max_new_tokens=20, do_sample=False, **more)
        for more in ({}, {"prompt_lookup_num_tokens": 3})
    ]
    assert counted and torch.equal(*found)


@pytest.mark.usefixtures("by_the_package", "exact")
def test_every_instruction_set_decodes(kernels: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, logits = packed("llama", tmp_path), []
    for level in kernels.levels:
        monkeypatch.setenv("COMPRESSOR_KERNELS", level)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert {vars(module)[MARK] for module in model.modules() if MARK in vars(module)} == {level}
        logits.append(generated(model)[1])
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("by_the_package", "kernels")
def test_whose_attention_is_replaced(tmp_path: Path, counted: list[tuple[int, ...]], monkeypatch: Any) -> None:
    """That of packed models with PyTorch's attention; not where another was asked for, nor of other models."""
    folder = packed("llama", tmp_path)
    for model in (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "source"),
    ):
        generated(model)
        assert not counted
    monkeypatch.setenv("COMPRESSOR_KERNELS", "torch")
    generated(AutoModelForCausalLM.from_pretrained(folder))
    assert not counted
    monkeypatch.delenv("COMPRESSOR_KERNELS")
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    compressor.accelerate(model)  # again
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before and len(model._forward_pre_hooks) == 1
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    generated(model)
    assert not counted


@pytest.mark.usefixtures("by_the_package", "kernels")
def test_copies(tmp_path: Path, counted: list[tuple[int, ...]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed("llama", tmp_path))
    want = generated(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        counted.clear()
        found = generated(other)
        assert counted and torch.equal(found[1], want[1])


@pytest.mark.usefixtures("by_the_package", "kernels")
def test_a_cache_that_the_model_made_grows_too(tmp_path: Path) -> None:
    """Read in pieces, with and without inference mode in between."""
    model = AutoModelForCausalLM.from_pretrained(packed("llama", tmp_path))
    ids = tiny_models.random_ids(2)
    with torch.no_grad():
        want = model(ids).logits
        out = model(ids[:, :5], use_cache=True)
        logits, cache = [out.logits], getattr(out, cache_name(type(model)))
    for place in range(5, ids.shape[1]):
        with torch.inference_mode() if place % 5 == 0 else torch.no_grad():
            logits.append(read_on(model, cache, input_ids=ids[:, place : place + 1])[0].logits.clone())
    assert all(type(layer) is GrowingLayer for layer in cache.layers)
    assert cache.get_seq_length() == ids.shape[1]
    assert (torch.cat(logits, 1) - want).abs().max() <= 0.02 * want.abs().max()  # activations of 8 bits


def test_gradients_go_through_the_cache(tmp_path: Path) -> None:
    """With gradients a token is added as transformers does."""
    layer = GrowingLayer()
    first, second = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(2))
    layer.update(first, first)
    keys, values = layer.update(second, second)
    (keys.sum() + 2 * values.sum()).backward()
    assert torch.equal(first.grad, torch.full_like(first, 3.0)) and torch.equal(
        second.grad, torch.full_like(second, 3.0)
    )


@torch.no_grad()
@pytest.mark.parametrize("seed", range(8))
def test_layers_of_a_cache(seed: int) -> None:
    """Any order of all that can be done with one gives the keys and values of transformers' layer; what was given out
    before, and what copies hold, never changes."""
    g = torch.Generator().manual_seed(seed)
    pairs: list[tuple[DynamicLayer, DynamicLayer]] = [(GrowingLayer(), DynamicLayer())]
    given: list[tuple[Tensor, Tensor]] = []

    def number(most: int) -> int:
        return int(torch.randint(0, most, (), generator=g))

    for _ in range(300):
        which = number(len(pairs))
        ours, theirs = pairs[which]
        rows = ours.keys.shape[0] if ours.get_seq_length() else 2
        what = number(12)
        if what == 0 and len(pairs) < 6:
            duplicate = copy.copy if number(2) else copy.deepcopy
            pairs.append((duplicate(ours), duplicate(theirs)))
        elif what == 1 and ours.get_seq_length() > 2:
            for layer in (ours, theirs):
                layer.crop(-2)
        elif what == 2 and ours.get_seq_length():
            order = torch.randint(0, rows, (rows,), generator=g)
            for layer in (ours, theirs):
                layer.reorder_cache(order)
        elif what == 3 and rows < 4:
            for layer in (ours, theirs):
                layer.batch_repeat_interleave(2)
        elif what == 4 and rows > 2:
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor([0, 1]))
        elif what == 5 and number(8) == 0:
            for layer in (ours, theirs):
                layer.reset()
        else:
            new = torch.randn(rows, 3, number(40) if number(4) == 0 else 1, 8, generator=g)
            found, want = ours.update(new, -new), theirs.update(new, -new)
            assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
            given.append((found[0], found[0].clone()))
        for mine, other in pairs:
            assert mine.get_seq_length() == other.get_seq_length()
            if mine.get_seq_length():
                assert torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)
    assert all(torch.equal(now, then) for now, then in given)


@torch.no_grad()
def test_a_token_copies_a_token() -> None:
    """Memory is new a few times only, however long a text gets."""
    layer, seen = GrowingLayer(), set[int]()
    for _ in range(3000):
        keys, _ = layer.update(*torch.zeros(2, 1, 2, 1, 16).unbind(0))
        seen.add(keys.data_ptr())
    assert keys.shape[2] == 3000 and len(seen) <= 12


def test_other_caches_stay_as_they_are(tmp_path: Path) -> None:
    model = tiny_models.random_model("llama", **WIDE["llama"])
    quicken(model, LEVELS[0])
    cache = DynamicCache()
    with torch.no_grad():
        read_on(model, cache, input_ids=prompts()["input_ids"])
    assert {type(layer) for layer in cache.layers} == {GrowingLayer}

    class Mine(DynamicCache):
        pass

    mine = Mine()
    with torch.no_grad():
        read_on(model, mine, input_ids=prompts()["input_ids"])
    assert {type(layer) for layer in mine.layers} == {DynamicLayer}
