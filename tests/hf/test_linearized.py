"""Linearized models as transformers uses them: caches, padding, generation, saving, loading without the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from linear_models import EXACT, FAMILIES, FAMILY_OF, SPECS, WINDOW, linearized, some_ids, student, teacher
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from compressor.hf.caches import read_on
from compressor.hf.linear_attention import LinearAttention
from compressor.hf.linear_cache import LinearState, state_bytes
from compressor.hf.linearized import attention_of, obstacle, only_parts
from compressor.hf.loading import packed_config_class
from compressor.mixers.spec import MEMORY

TOLERANCE = 2e-5  # norms and rotations are in single precision even in a model of double precision


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def in_steps(model: Any, ids: Tensor, lengths: list[int], cache: Any = None) -> tuple[Tensor, Any]:
    """Logits of ``ids`` given in pieces, and the cache behind them."""
    cache = DynamicCache() if cache is None else cache
    logits, start = [], 0
    for length in lengths:
        out, _ = read_on(model, cache, input_ids=ids[:, start : start + length])
        logits.append(out.logits)
        start += length
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
def test_texts_within_the_window_are_exact(family: str, layers: tuple[int, ...]) -> None:
    """Biases, norms, groups of heads, partial rotations: the teacher's logits, whatever the new parameters are."""
    ids = some_ids(2, 3 * WINDOW)
    wanted = teacher(family)(ids).logits
    assert wanted.std() > 1 and apart(wanted[:, 5], wanted[:, 6]) > 1
    model = linearized(family, SPECS["windowed"], layers)
    assert apart(model(ids[:, :WINDOW]).logits, wanted[:, :WINDOW]) < TOLERANCE
    assert apart(model(ids).logits[:, :WINDOW], wanted[:, :WINDOW]) < TOLERANCE
    assert apart(model(ids).logits[:, -1], wanted[:, -1]) > 0.1


@pytest.mark.parametrize("name", SPECS)
def test_only_exact_specs_are_exact(name: str) -> None:
    ids = some_ids(2, WINDOW)
    difference = apart(student(name)(ids).logits, teacher(FAMILY_OF[name])(ids).logits)
    assert difference < TOLERANCE if name in EXACT else difference > 0.1


@pytest.mark.parametrize("name", SPECS)
def test_prefill_decoding_and_chunks_agree(name: str) -> None:
    model, ids = student(name), some_ids(2, 40)
    whole = model(ids, use_cache=False).logits
    for lengths in ([20, *[1] * 20], [7, 1, 13, 19], [1, 39]):
        logits, _ = in_steps(model, ids, lengths)
        assert apart(logits, whole) < TOLERANCE, lengths


@pytest.mark.parametrize("name", SPECS)
def test_later_tokens_change_nothing_before_them(name: str) -> None:
    model, ids = student(name), some_ids(1, 40)
    other = torch.cat([ids[:, :25], some_ids(1, 15, seed=9)], 1)
    one, two = model(ids, use_cache=False).logits, model(other, use_cache=False).logits
    assert apart(one[:, :25], two[:, :25]) < TOLERANCE and apart(one[:, 25:], two[:, 25:]) > 0.1


@pytest.mark.parametrize("name", SPECS)
def test_left_padding_changes_nothing(name: str) -> None:
    """Rows of 30, 23 and 11 tokens together, then three more one by one: as each of them alone."""
    model, lengths = student(name), (30, 23, 11)
    texts = [some_ids(1, length + 3, seed=length) for length in lengths]
    ids, mask = torch.zeros(3, 33, dtype=torch.long), torch.zeros(3, 33, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, 33 - text.shape[1] :], mask[row, 33 - text.shape[1] :] = text[0], 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, parts, start = DynamicCache(), [], 0
    for stop in (30, 31, 32, 33):
        at = slice(start, stop)
        step = {"attention_mask": mask[:, :stop], "position_ids": positions[:, at]}
        parts.append(read_on(model, cache, input_ids=ids[:, at], **step)[0].logits)
        start = stop
    together = torch.cat(parts, 1)
    for row, text in enumerate(texts):
        alone = model(text, use_cache=False).logits[0]
        assert apart(together[row, -len(alone) :], alone) < TOLERANCE


@pytest.mark.parametrize("name", SPECS)
def test_greedy_decoding_with_a_cache_and_without(name: str) -> None:
    model, ids = student(name), some_ids(2, 18)
    options = {"max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), wanted)


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 2), (1, 2)])
def test_ways_of_generating(layers: tuple[int, ...]) -> None:
    model, ids = linearized("qwen3", SPECS["windowed"], layers), some_ids(2, 18)
    plain = {"do_sample": False, "max_new_tokens": 10}
    wanted = model.generate(ids, use_cache=False, **plain)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(23) >= 5).long().expand(2, -1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **plain)[:, 5:], wanted)
    assert torch.equal(model.generate(ids, prefill_chunk_size=7, **plain), wanted)
    beams = {**plain, "num_beams": 3}
    wanted = model.generate(ids, use_cache=False, **beams)
    assert torch.equal(model.generate(ids, **beams), wanted)
    sampled = model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=4)
    assert sampled.shape == (6, 22)


@pytest.mark.parametrize("name", SPECS)
def test_rows_of_a_cache_are_repeated_reordered_and_selected(name: str) -> None:
    model, ids = student(name), some_ids(3, 30)
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
    ):
        _, cache = in_steps(model, ids, [26])
        change(cache)
        rest = some_ids(len(rows), 4, seed=8)
        got, _ = in_steps(model, rest, [1, 3], cache)
        wanted = model(torch.cat([ids[rows, :26], rest], 1), use_cache=False).logits[:, 26:]
        assert apart(got, wanted) < TOLERANCE


@pytest.mark.parametrize("name", SPECS)
def test_the_state_does_not_grow(name: str) -> None:
    model = student(name)
    _, short = in_steps(model, some_ids(1, 30), [30])
    _, long = in_steps(model, some_ids(1, 90), [60, 1, 29])
    assert all(isinstance(layer, LinearState) for layer in long.layers)
    assert state_bytes(short) == state_bytes(long) > 0
    assert long.get_seq_length() == 90
    mixed = linearized(FAMILY_OF[name], SPECS[name], (0, 2))
    keys_and_values = 2 * 2 * 8 * 8  # of 8 bytes each
    _, short = in_steps(mixed, some_ids(1, 30), [30])
    _, long = in_steps(mixed, some_ids(1, 90), [60, 30])
    assert state_bytes(long) - state_bytes(short) == 60 * keys_and_values


@pytest.mark.parametrize("name", SPECS)
def test_everything_new_can_be_trained(name: str) -> None:
    """Every new parameter has a gradient that is finite and not zero."""
    with torch.enable_grad():
        model = linearized(FAMILY_OF[name], SPECS[name])
        ids = some_ids(2, 40)
        model(ids, labels=ids).loss.backward()
    new = {n: p for n, p in model.named_parameters() if ".lin_" in n}
    assert bool(new) == (name not in ("window-sink", "liger"))
    for parameter in new.values():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()


def test_one_part_at_work_alone() -> None:
    model, ids = student("windowed"), some_ids(1, 40)
    whole = model(ids).logits
    window_alone = linearized(FAMILY_OF["windowed"], SPECS["window-sink"])(ids[:, :40]).logits
    with only_parts(model, "window"):
        sinks = SPECS["windowed"].sinks == SPECS["window-sink"].sinks
        assert sinks and apart(model(ids).logits, window_alone) < TOLERANCE
    with only_parts(model, MEMORY):
        assert apart(model(ids[:, :5]).logits, whole[:, :5]) > 0.1
    assert torch.equal(model(ids).logits, whole)


@pytest.mark.parametrize("name", SPECS)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    model, ids = linearized(FAMILY_OF[name], SPECS[name], (0, 2), torch.float32), some_ids(2, 40)
    wanted = model(ids).logits
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "compressor" and config["linear_attention"]["layers"] == [0, 2]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(ids).logits, wanted)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for key, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if ".lin_" in key else torch.bfloat16), key
    out, cache = read_on(half, None, input_ids=ids)
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
    assert cache.layers[0].tensors["memory"].dtype == torch.float32


def test_a_folder_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    linearized("llama", SPECS["windowed"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.lin_mix"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fill model\.layers\.1\.self_attn\.lin_mix"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_settings_of_a_later_version_are_refused(tmp_path: Path) -> None:
    linearized("llama", SPECS["windowed"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["linear_attention"]["mixer"]["novelty"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="novelty"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_reader_file_is_enough(tmp_path: Path) -> None:
    """In a fresh process without the package: every family's folder, generation too; refused without consent."""
    expected, ids = {}, some_ids(2, 30)
    names = ("windowed", "lizard", "lawcat", "supra", "regla", "lightning")
    for name in names:
        model = linearized(FAMILY_OF[name], SPECS[name], (0, 2), torch.float32)
        model.save_pretrained(tmp_path / name)
        made = model.generate(ids, max_new_tokens=5, do_sample=False)
        expected[name] = (model(ids).logits, made)
    torch.save({"ids": ids, "expected": expected}, tmp_path / "expected.pt")
    script = """
import sys
sys.modules["compressor"] = None
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
here = Path(sys.argv[1])
saved = torch.load(here / "expected.pt")
try:
    AutoModelForCausalLM.from_pretrained(here / "windowed")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("no consent was needed")
for name, (logits, made) in saved["expected"].items():
    model = AutoModelForCausalLM.from_pretrained(here / name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        assert torch.equal(model(saved["ids"]).logits, logits), name
        assert torch.equal(model.generate(saved["ids"], max_new_tokens=5, do_sample=False), made), name
"""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["windowed", "regla"])
def test_compiled_it_is_the_same(name: str) -> None:
    model, ids = linearized(FAMILY_OF[name], SPECS[name], (0, 2)), some_ids(2, 30)
    wanted = model(ids, use_cache=False).logits
    assert apart(torch.compile(model, backend="eager")(ids, use_cache=False).logits, wanted) < TOLERANCE


def test_a_static_cache_or_a_square_mask_is_refused() -> None:
    model, ids = student("windowed"), some_ids(1, 10)
    with pytest.raises(ValueError, match=r"mask of shape \(batch, tokens\)"):
        model(ids, attention_mask=torch.ones(1, 1, 10, 10, dtype=torch.float64))
    with pytest.raises(ValueError, match="cannot use a static cache"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(ValueError, match="cannot use a static cache"):
        read_on(model, StaticCache(config=model.config, max_cache_len=40), input_ids=ids)


def test_a_cache_of_another_model_is_refused() -> None:
    ids = some_ids(1, 10)
    family = FAMILY_OF["windowed"]
    _, cache = read_on(teacher(family), None, input_ids=ids)
    with pytest.raises(ValueError, match="already holds keys"):
        read_on(student("windowed"), cache, input_ids=ids)


def test_assisted_decoding_is_refused() -> None:
    model, ids = student("windowed"), some_ids(1, 10)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, assistant_model=teacher(FAMILY_OF["windowed"]), max_new_tokens=5, do_sample=False)
    _, cache = in_steps(model, ids, [10])
    with pytest.raises(ValueError, match="assisted decoding"):
        cache.crop(5)


def test_linears_stay_linears() -> None:
    """What compresses linears finds those of the teacher, and nothing else."""
    for name in SPECS:
        names = {n for n, module in student(name).named_modules() if isinstance(module, torch.nn.Linear)}
        assert names == {n for n, m in teacher(FAMILY_OF[name]).named_modules() if isinstance(m, torch.nn.Linear)}
        assert any(isinstance(module, LinearAttention) for module in student(name).modules())


OBSTACLES: dict[str, tuple[str, dict[str, Any]]] = {
    "its sinks would be lost": (
        "gpt_oss",
        {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 64},
    ),
    "layernorm would be lost": ("stablelm", {"qk_layernorm": True}),
    "over more than a head": ("olmo2", {}),
    "clip_qkv": ("olmo", {"clip_qkv": 3.0}),
    "attn_logit_softcapping": ("gemma2", {"head_dim": 8, "sliding_window": 64}),
    "one query and one output per head": ("qwen3_next", {"head_dim": 8, "layer_types": ["full_attention"] * 3}),
    "sees 8 tokens already": ("mistral", {"sliding_window": 8}),
    "no attention with q_proj": ("phi3", {}),
}


@pytest.mark.parametrize("words", OBSTACLES)
def test_attention_that_would_lose_something_is_refused(words: str) -> None:
    family, more = OBSTACLES[words]
    sizes = {**FAMILIES["mistral"], **more}
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **sizes))
    layer = model.config.num_hidden_layers - 1
    try:
        found = obstacle(attention_of(model.model.layers[layer])[1], SPECS["windowed"])
    except ValueError as error:
        found = str(error)
    assert found and words in found
    content = {"layers": [layer], "mixer": SPECS["windowed"].content()}
    with pytest.raises(ValueError, match=r"cannot be linearized|no attention"):
        AutoModelForCausalLM.from_config(packed_config_class(family)(**sizes, linear_attention=content))


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_attention_has_no_obstacles(family: str) -> None:
    for block in teacher(family).model.layers:
        assert all(obstacle(attention_of(block)[1], spec) is None for spec in SPECS.values())


@pytest.mark.parametrize(("family", "padding"), [("llama", 7), ("stablelm", 0)])
def test_gradient_checkpointing_knows_the_padding(family: str, padding: int) -> None:
    """Layers that are computed again see the mask of their own forward pass, not of a later one."""
    ids, gradients = some_ids(2, 20), []
    mask = (torch.arange(20) >= torch.tensor([[padding], [0]])).long()
    for checkpointing in (False, True):
        with torch.enable_grad():
            model = linearized(family, SPECS["windowed"]).train()
            if checkpointing:
                getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            loss = model(ids, attention_mask=mask, use_cache=False).logits[:, -1].square().sum()
            model(ids, use_cache=False)
            loss.backward()
        gradients.append(model.model.layers[1].self_attn.lin_q.weight.grad)
    assert gradients[0].any() and apart(*gradients) < TOLERANCE * float(gradients[0].abs().max())


def test_gradient_checkpointing_that_would_forget_the_padding_is_refused() -> None:
    model, ids = linearized("stablelm", SPECS["windowed"]).train(), some_ids(1, 20)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    mask = (torch.arange(20) >= 7).long()[None]
    with torch.enable_grad(), pytest.raises(ValueError, match="forgets the padding"):
        model(ids, attention_mask=mask, use_cache=False)
    model(ids, attention_mask=mask, use_cache=False)
