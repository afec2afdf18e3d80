"""Exports as stock transformers loads them: exact where nothing is converted, whole models where something is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compressor.engine.native_start import settle
from compressor.errors import UserError
from compressor.hf import native_qwen
from compressor.hf.caches import read_on
from compressor.hf.native import (
    caveats,
    check,
    check_norms,
    content,
    native_block,
    native_config,
    native_outer,
    refusals,
    student_layer,
)
from compressor.hf.native_source import TAP, repeat_heads, source_config

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("mamba2", "llama", {}),
    "llama untied": ("mamba2", "llama", {"tie_word_embeddings": False}),
    "llama one key head": ("mamba2", "llama", {"num_key_value_heads": 1}),
    "llama as many key heads": ("mamba2", "llama", {"num_key_value_heads": 4}),
    "llama wide heads": ("mamba2", "llama", {"head_dim": 16}),
    "llama biases": ("mamba2", "llama", {"attention_bias": True}),
    "llama llama3": ("mamba2", "llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("mamba2", "llama", {"rope_parameters": YARN}),
    "llama linear": ("mamba2", "llama", {"rope_parameters": LINEAR}),
    "llama dynamic": ("mamba2", "llama", {"rope_parameters": DYNAMIC}),
    "llama longrope": ("mamba2", "llama", {"rope_parameters": LONG}),
    "mistral": ("mamba2", "mistral", {"sliding_window": None}),
    "mistral wide window": ("mamba2", "mistral", {"sliding_window": 64}),
    "qwen2": ("mamba2", "qwen2", {}),
    "qwen2 tied": ("mamba2", "qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("gdn", "qwen3", {}),
    "qwen3 untied": ("gdn", "qwen3", {"tie_word_embeddings": False}),
    "qwen3 wide heads": ("gdn", "qwen3", {"head_dim": 16, "num_key_value_heads": 1}),
    "qwen3 yarn": ("gdn", "qwen3", {"rope_parameters": YARN}),
    "qwen3 llama3": ("gdn", "qwen3", {"rope_parameters": LLAMA3}),
    "qwen3 linear": ("gdn", "qwen3", {"rope_parameters": LINEAR}),
    "qwen3 dynamic": ("gdn", "qwen3", {"rope_parameters": DYNAMIC}),
    "qwen3 longrope": ("gdn", "qwen3", {"rope_parameters": LONG}),
}
MIXED = ["llama", "llama biases", "llama wide heads", "mistral", "qwen2", "qwen3", "qwen3 untied"]


def source(name: str, **more: Any) -> tuple[str, Any]:
    """The method that goes with a model, and the model; 3 layers.

    64 neurons: Granite's SiLU runs over rows of a stacked matrix, and what of a row does not fill the processor's
    vectors is rounded otherwise.
    """
    method, family, config = MODELS[name]
    return method, tiny_models.random_model(
        family, **{"num_hidden_layers": 3, "intermediate_size": 64, **config, **more}
    )


def config_of(model: Any) -> dict[str, Any]:
    """config.json of a model."""
    content: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return content


def export(method: str, model: Any, folder: Path, students: dict[int, nn.Module] | None = None) -> Path:
    """Write an export block by block, as a run would."""
    students = students or {}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.state_dict())
    written: dict[str, Tensor] = {}
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        block = {name.removeprefix(prefix): tensors.pop(name) for name in [*tensors] if name.startswith(prefix)}
        student = students[layer].state_dict() if layer in students else None
        written |= {prefix + name: value for name, value in native_block(method, block, student).items()}
    written |= native_outer(method, tensors, tied=model.config.tie_word_embeddings)
    save_file({name: value.contiguous() for name, value in written.items()}, folder / "model.safetensors")
    content = native_config(config_of(model), method, [*students])
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def load(folder: Path, **how: Any) -> Any:
    """Load by stock transformers; nothing may be missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__module__.startswith("transformers.models.")
    return model.eval()


@contextmanager
def recorded(attention: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What an attention is given and returns, while this is open."""
    calls: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], output[0]))

    handle = attention.register_forward_hook(hook, with_kwargs=True)
    yield calls
    handle.remove()


@torch.no_grad()
def seen(model: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Normed hidden states of a layer, and the outputs of its attention."""
    with recorded(model.model.layers[layer].self_attn) as calls:
        model(tiny_models.random_ids(16))
    return calls[0]


@cache
def mixed(name: str) -> tuple[str, Any, dict[int, nn.Module]]:
    """A model and students for its first two layers, settled, with every value shaken so that all of them count."""
    method, model = source(name)
    students = {}
    for layer in (0, 2):
        attention = model.model.layers[layer].self_attn
        student = student_layer(config_of(model), method, layer, attention)
        settle(student, attention, *seen(model, layer))
        generator = torch.Generator().manual_seed(layer)
        free = free_values(method, student)
        with torch.no_grad():
            for key, value in student.named_parameters():
                value.add_(0.1 * torch.randn(value.shape, generator=generator) * free.get(key, 1))
        students[layer] = student
    return method, model, students


def free_values(method: str, student: Any) -> dict[str, Tensor]:
    """1 where a parameter is trained, for parameters that are trained in part."""
    if method != "mamba2":
        return {}
    free = torch.ones_like(student.in_proj.bias)
    free[student.intermediate_size : student.intermediate_size + student.conv_dim] = 0
    return {"in_proj.bias": free}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_nothing_converted_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    method, model = source(name)
    ids = tiny_models.random_ids(3)
    loaded = load(export(method, model, tmp_path / "out"))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.model_type == {"mamba2": "granitemoehybrid", "gdn": "qwen3_5_text"}[method]
    assert loaded.config.layer_types == ["full_attention"] * 3
    left = torch.cat([torch.zeros(3, 4, dtype=torch.int64), torch.ones(3, 20, dtype=torch.int64)], 1)
    shown = {"input_ids": ids, "attention_mask": left}
    torch.testing.assert_close(loaded(**shown).logits[:, 4:], model(**shown).logits[:, 4:], rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


@torch.no_grad()
def test_odd_numbers_of_neurons_cost_one_rounding(tmp_path: Path) -> None:
    method, model = source("llama", intermediate_size=45)
    ids = tiny_models.random_ids(3)
    torch.testing.assert_close(load(export(method, model, tmp_path))(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_half_precision_stays_close(name: str, tmp_path: Path) -> None:
    method, model = source(name, dtype=torch.bfloat16)
    loaded = load(export(method, model, tmp_path))
    assert loaded.dtype == torch.bfloat16
    ids = tiny_models.random_ids(3)
    if method == "mamba2":
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    else:  # Qwen3.5 multiplies by the norm's weight before it rounds, Qwen3 after
        reference = model.float()(ids).logits
        assert (loaded.float()(ids).logits - reference).norm() < 0.01 * reference.norm()


def test_a_process_without_this_package_loads_it(tmp_path: Path) -> None:
    for name in ("llama", "qwen3"):
        method, model, students = mixed(name)
        export(method, model, tmp_path / name, students)
        with torch.no_grad():
            expected = load(tmp_path / name)(tiny_models.random_ids(1)).logits.sum()
        (tmp_path / name / "expected").write_text(str(expected))
    script = """
import sys, torch
sys.meta_path = [finder for finder in sys.meta_path if "compressor" not in repr(finder)]
from pathlib import Path
from transformers import AutoModelForCausalLM
ids = torch.tensor(eval(sys.argv[2]))
for name in ("llama", "qwen3"):
    folder = Path(sys.argv[1]) / name
    with torch.no_grad():
        got = str(AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits.sum())
    assert got == (folder / "expected").read_text(), (name, got)
assert not any(name.partition(".")[0] == "compressor" for name in sys.modules)
"""
    ids = str(tiny_models.random_ids(1).tolist())
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), ids], check=True, cwd=tmp_path, env=environment, timeout=300
    )


def test_what_the_norm_of_mamba_2_is_over_is_said() -> None:
    """Whether a head that is large makes the others small, in the installed class."""
    _, model, students = mixed("llama")
    norm: Any = next(iter(students.values())).norm
    states = torch.randn(4, norm.weight.numel(), generator=torch.Generator().manual_seed(0))
    grown = states.clone()
    grown[:, : len(states[0]) // 4] *= 1000  # the first of four heads
    alone = torch.equal(norm(states)[:, -1], norm(grown)[:, -1])
    said = content(config_of(model), "mamba2")["norm"]
    assert said.startswith("each head alone" if alone else "all heads") and alone == (not caveats("mamba2"))
    assert not caveats("gdn")


@pytest.mark.parametrize("name", MIXED)
@torch.no_grad()
def test_converted_layers_compute_what_was_trained(name: str, tmp_path: Path) -> None:
    method, model, students = mixed(name)
    loaded = load(export(method, model, tmp_path, students))
    assert loaded.config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    ids = tiny_models.random_ids(3)
    handles = [
        model.model.layers[layer].self_attn.register_forward_hook(
            lambda _module, args, kwargs, output, student=student: (student(kwargs["hidden_states"]), None),
            with_kwargs=True,
        )
        for layer, student in students.items()
    ]
    expected = model(ids).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
    assert (expected - model(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", MIXED)
@torch.no_grad()
def test_a_mixed_model_continues_pads_and_generates(name: str, tmp_path: Path) -> None:
    method, model, students = mixed(name)
    loaded = load(export(method, model, tmp_path, students))
    ids = tiny_models.random_ids(2)
    whole = loaded(ids).logits
    near = {"rtol": 0, "atol": 1e-4 * float(whole.abs().max())}

    first, cache = read_on(loaded, None, input_ids=ids[:, :13])
    second, cache = read_on(loaded, cache, input_ids=ids[:, 13:20])
    parts = [first.logits, second.logits]
    for t in range(20, 24):
        step, cache = read_on(loaded, cache, input_ids=ids[:, t : t + 1])
        parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **near)

    pad = torch.ones(2, 5, dtype=torch.int64)
    mask = torch.cat([0 * pad, torch.ones_like(ids)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = loaded(torch.cat([pad, ids], 1), attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(padded, whole, **near)

    how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    greedy = loaded.generate(ids, max_new_tokens=6, **how)
    for t in range(24, 30):
        assert torch.equal(loaded(greedy[:, :t]).logits[:, -1].argmax(-1), greedy[:, t])
    behind_pads = loaded.generate(torch.cat([pad, ids], 1), attention_mask=mask, max_new_tokens=6, **how)
    assert torch.equal(behind_pads[:, 5:], greedy)
    beams = {"num_beams": 3, "max_new_tokens": 5, **how}
    assert torch.equal(loaded.generate(ids, **beams), loaded.generate(ids, use_cache=False, **beams))


def test_heads_are_repeated_whole() -> None:
    rows = torch.arange(2 * 3)[:, None].float()
    assert repeat_heads(rows, 2, 2)[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    _, grouped = source("llama")
    _, full = source("llama", num_key_value_heads=4)
    state = grouped.state_dict()
    for name in [*state]:
        if "k_proj" in name or "v_proj" in name:
            state[name] = repeat_heads(state[name], 2, 2)
    full.load_state_dict(state)
    ids = tiny_models.random_ids(2)
    with torch.no_grad():
        torch.testing.assert_close(full(ids).logits, grouped(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "llama biases", "qwen3"])
def test_a_student_starts_from_the_teachers_weights(name: str) -> None:
    """Its first steps, by hand and head by head, without the norm behind."""
    method, model = source(name)
    attention = model.model.layers[1].self_attn
    student: Any = student_layer(config_of(model), method, 1, attention)
    hidden, _ = seen(model, 1)
    silu = torch.nn.functional.silu
    with torch.no_grad():
        q, k, v = (getattr(attention, f"{part}_proj")(hidden).unflatten(-1, (-1, 8)) for part in "qkv")
        if method == "gdn":
            q, k = q * attention.q_norm.weight, k * attention.k_norm.weight
        k, v = (torch.stack([part[..., head // 2, :] for head in range(4)], 2) for part in (k, v))
        expected = [silu(TAP * part).flatten(2) for part in ((v, k, q) if method == "mamba2" else (q, k, v))]
        mixed_in = student.in_proj(hidden)[..., 32:-4] if method == "mamba2" else student.in_proj_qkv(hidden)
        got = silu(student.conv1d(mixed_in.transpose(1, 2))[..., : hidden.shape[1]].transpose(1, 2))
    torch.testing.assert_close(got, torch.cat(expected, -1), rtol=0, atol=1e-5)
    with torch.no_grad():
        decays = torch.exp(-student.A_log.exp() * torch.nn.functional.softplus(student.dt_bias))
    assert float(decays[0]) == pytest.approx(0.5, abs=1e-5) and float(decays[-1]) == pytest.approx(0.99, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_settling_helps_and_training_moves_everything(name: str) -> None:
    method, model = source(name)
    attention = model.model.layers[1].self_attn
    before = torch.random.get_rng_state()
    student: Any = student_layer(config_of(model), method, 1, attention)
    assert torch.equal(before, torch.random.get_rng_state())
    hidden, target = seen(model, 1)

    def error() -> Tensor:
        return (student(hidden) - target).square().sum() / target.square().sum()

    settle(student, attention, hidden, target)
    start = error().item()
    assert start < 0.9
    values = {key: value.clone() for key, value in student.named_parameters()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(25):
        optimizer.zero_grad()
        error().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert error().item() < 0.75 * start
    free = free_values(method, student)
    for key, value in student.named_parameters():
        moved = (value != values[key]).float()
        # a delta net's A and dt only matter as a product, but both move; the last token of a window has no successor
        assert torch.equal(moved > 0, free.get(key, torch.ones_like(moved)) > 0) or (
            key not in free and float(moved.mean()) > 0.95
        ), key


def test_small_norms_are_folded(tmp_path: Path) -> None:
    """In bf16, weights near zero would be lost in 1 + w; so would in fp32, to a lesser degree."""
    method, model = source("qwen3 untied")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("norm.weight") and not name.endswith(("q_norm.weight", "k_norm.weight")):
                value.copy_(0.01 + 0.1 * torch.rand(value.shape, generator=generator))
    model = model.to(torch.bfloat16)
    ids = tiny_models.random_ids(2)
    for students in ({}, {0: student_layer(config_of(model), method, 0, model.model.layers[0].self_attn)}):
        loaded = load(export(method, model, tmp_path, students)).float()
        norms = dict(loaded.named_parameters())
        assert not norms["model.norm.weight"].any() and not norms["model.layers.1.input_layernorm.weight"].any()
        reference = model.float()
        with torch.no_grad():
            if students:
                hidden, _ = seen(reference, 0)
                with recorded(loaded.model.layers[0].linear_attn) as calls:
                    loaded(tiny_models.random_ids(16))
                folded = loaded.model.layers[0].linear_attn.in_proj_qkv(calls[0][0])
                straight = students[0].in_proj_qkv(hidden)
                assert (folded - straight).norm() < 0.01 * straight.norm()
            else:
                expected = reference(ids).logits
                assert (loaded(ids).logits - expected).norm() < 0.02 * expected.norm()
        model = model.to(torch.bfloat16)


def test_norm_errors_are_what_they_are_said_to_be() -> None:
    for low, high, worst in ((0.5, 2.0, 0.0), (0.25, 0.5, 0.0079), (0.1, 0.25, 0.0197)):
        weight = torch.linspace(low, high, 4001).to(torch.bfloat16)
        error = native_qwen.norm_error(weight)
        assert worst * 0.8 <= error <= worst
        assert native_qwen.needs_folding(weight) is (worst > 0)
    exact = torch.tensor([0.0, 1.0, -1.0, 0.5, 3.0])
    assert native_qwen.norm_error(exact) == 0.0


def test_norms_that_cannot_be_stored_are_refused() -> None:
    small = torch.tensor([0.011, 0.012], dtype=torch.bfloat16)
    _, model = source("qwen3")
    config = config_of(model)
    name = "model.layers.1.self_attn.k_norm.weight"
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_norm"):
        check_norms(config, "gdn", {name: small, "model.layers.0.input_layernorm.weight": small})
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        check_norms(config, "gdn", {"model.norm.weight": small})
    check_norms({**config, "tie_word_embeddings": False}, "gdn", {"model.norm.weight": small})
    check_norms(config, "gdn", {name: torch.tensor([0.02, 1.5], dtype=torch.bfloat16)})
    check_norms(config, "mamba2", {name: small})


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "window": ("mamba2", "mistral", {"sliding_window": 8}, "sliding window of 8"),
    "window of some": ("mamba2", "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
                                           "layer_types": None}, "sliding window of 8"),
    "activation": ("mamba2", "llama", {"hidden_act": "gelu"}, "activation is gelu"),
    "mlp bias": ("mamba2", "llama", {"mlp_bias": True}, "MLPs have biases"),
    "width": ("mamba2", "llama", {"head_dim": 12}, "48 wide together"),
    "narrow": ("mamba2", "llama", {"head_dim": 4}, "16 wide together"),
    "quantized": ("mamba2", "llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized"),
    "partial": ("mamba2", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                        "partial_rotary_factor": 0.5}}, "only a part"),
    "positions": ("mamba2", "llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
                  "of type 'proportional'"),
    "qwen3 bias": ("gdn", "qwen3", {"attention_bias": True}, "biases"),
    "other method": ("mamba2", "qwen3", {}, "not qwen3; gdn does"),
    "other method too": ("gdn", "llama", {}, "not llama; mamba2 does"),
    "unknown": ("mamba2", "gemma2", {}, "not gemma2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_is_refused_by_name(name: str) -> None:
    method, family, changes, reason = REFUSED[name]
    config = {**json.loads(tiny_models.FAMILIES[family]().to_json_string(use_diff=False)), **changes}
    if changes.get("layer_types", 0) is None:
        del config["layer_types"]
    assert len(refusals(config, method)) == 1
    with pytest.raises(UserError, match=reason):
        check(config, method)
    with pytest.raises(UserError, match=reason):
        native_config(config, method, [0])


def test_other_mistakes_are_refused() -> None:
    method, model = source("llama")
    config = config_of(model)
    for converted in ([0, 0], [3], [-1], [0, 1, 2]):
        with pytest.raises(UserError, match=r"numbers from 0 to 2|softmax"):
            native_config(config, method, converted)
    with pytest.raises(UserError, match="mamba2"):
        check(config, "mamba")
    for other in ("mamba2", "gdn"):
        with pytest.raises(UserError, match=r"self_attn\.sinks"):
            native_block(other, {"self_attn.sinks": torch.zeros(1)})


def test_old_notations_of_positions_are_read() -> None:
    config = {"model_type": "llama", "rope_theta": 5e5, "num_hidden_layers": 2, "hidden_size": 64,
              "num_attention_heads": 4, "rope_scaling": {"type": "linear", "factor": 2.0},
              "torch_dtype": "bfloat16"}  # fmt: skip
    written = native_config(config, "mamba2", [1])
    assert written["dtype"] == "bfloat16"
    positions = written["rope_parameters"]
    assert (positions["rope_type"], positions["rope_theta"], positions["factor"]) == ("linear", 5e5, 2.0)
    assert written["num_key_value_heads"] == 4 and "head_dim" not in written
    assert source_config(written).layer_types == ["full_attention", "linear_attention"]


def test_what_is_held_stays_held_in_another_parameter() -> None:
    """Sharding puts new parameters in the place of those that were there."""
    model = tiny_models.random_model("qwen2")
    attention = model.model.layers[0].self_attn
    layer: Any = student_layer(config_of(model), "mamba2", 0, attention)
    inner = len(layer.norm.weight)
    for _ in range(2):
        layer.in_proj.bias = nn.Parameter(layer.in_proj.bias.detach().clone())
        layer.zero_grad()
        for _ in range(2):
            layer(torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        gradient = layer.in_proj.bias.grad
        assert not gradient[inner : 4 * inner].any() and bool((gradient[:inner] != 0).any())
