"""The plugin for vLLM on a stand-in with its signatures. It has not been run on vLLM itself."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import integer_models
import pytest
import repacked
import tiny_models
import torch
import vllm_stand_in
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig
from vllm_stand_in import LinearBase, VocabParallelEmbedding

import compressor  # noqa: F401  # so that transformers knows our folders
from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.skeleton import build_skeleton
from compressor.formats import LowRank, pack
from compressor.formats.dense import Dense
from compressor.hf import vllm_plugin

QKV, GATE_UP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
STACKED: dict[str, tuple[str, Any]] = {
    **{f".{name}": (".qkv_proj", shard) for name, shard in zip(QKV, "qkv", strict=True)},
    **{f".{name}": (".gate_up_proj", shard) for shard, name in enumerate(GATE_UP)},
}


@pytest.fixture
def config_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    vllm_stand_in.install(monkeypatch)
    vllm_plugin.config_class.cache_clear()
    vllm_plugin.register()
    vllm_plugin.register()  # vLLM may do so
    yield vllm_stand_in.REGISTERED["compressor"]
    vllm_stand_in.REGISTERED.clear()
    vllm_plugin.config_class.cache_clear()


def opened(config_class: Any, folder: Path) -> Any:
    """The quantization config, in the way that vLLM comes to it."""
    hf_config = AutoConfig.from_pretrained(folder)
    assert hf_config.architectures == ["LlamaForCausalLM"] and hf_config.model_type == "llama"
    content = hf_config.quantization_config
    assert content["quant_method"] in vllm_stand_in.REGISTERED
    found = config_class.from_config(content)
    found.maybe_update_config(str(folder), hf_config=hf_config)
    found.packed_modules_mapping = {"qkv_proj": QKV, "gate_up_proj": GATE_UP}
    return found


def model_of(config: Any, blocks: int = 2, ranks: int = 1) -> nn.Module:
    """The layers of vLLM's Llama, by the same paths."""
    root = nn.Module()
    root.model = nn.Module()
    root.model.embed_tokens = VocabParallelEmbedding(config, "model.embed_tokens", tiny_models.VOCABULARY, 64)
    layers = []
    for number in range(blocks):
        path, block = f"model.layers.{number}", nn.Module()
        block.self_attn, block.mlp = nn.Module(), nn.Module()
        how: dict[str, Any] = {"bias": False, "ranks": ranks}
        block.self_attn.qkv_proj = LinearBase(config, f"{path}.self_attn.qkv_proj", [64, 32, 32], 64, **how)
        block.self_attn.o_proj = LinearBase(config, f"{path}.self_attn.o_proj", [64], 64, **how)
        block.mlp.gate_up_proj = LinearBase(config, f"{path}.mlp.gate_up_proj", [128, 128], 64, **how)
        block.mlp.down_proj = LinearBase(config, f"{path}.mlp.down_proj", [64], 128, **how)
        layers.append(block)
    root.model.layers = nn.ModuleList(layers)
    root.lm_head = VocabParallelEmbedding(config, "lm_head", tiny_models.VOCABULARY, 64)
    root.lm_head.quant_method.tie_weights(root.lm_head, root.model.embed_tokens)
    return root


def filled(config_class: Any, folder: Path) -> nn.Module:
    model = model_of(opened(config_class, folder))
    tensors = load_file(folder / "model.safetensors")
    vllm_stand_in.load_weights(model, ((n, t) for n, t in tensors.items() if "norm" not in n), STACKED)
    return model


def products(name: str, weight: Tensor) -> Any:
    """Products of two matrices beside what is dense."""
    return LowRank(Dense(weight[:, :4].half()), Dense(weight[:4].half())) if "q_proj" in name else None


@pytest.mark.parametrize("code", [repacked.everything, integer_models.mixed, products])
def test_joined_layers_hold_their_members_in_order(code: Any, config_class: Any, tmp_path: Path) -> None:
    source = integer_models.source(tmp_path / "source")
    folder = repacked.repack(source, tmp_path / "packed", code)
    ours, model = build_skeleton(open_checkpoint(folder)), filled(config_class, folder)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for number, block in enumerate(model.model.layers):  # type: ignore[union-attr,arg-type]
        path = f"model.layers.{number}"
        for layer, parent, names in (
            (block.self_attn.qkv_proj, "self_attn", QKV),
            (block.self_attn.o_proj, "self_attn", ["o_proj"]),
            (block.mlp.gate_up_proj, "mlp", GATE_UP),
            (block.mlp.down_proj, "mlp", ["down_proj"]),
        ):
            want = torch.cat([ours.read(f"{path}.{parent}.{name}.weight") for name in names])
            assert torch.equal(layer.weight, want), (path, names)
            assert [name for name, _ in layer.named_parameters()] == ["weight"]
            if want.shape[1] == 64:
                torch.testing.assert_close(layer(x), x @ want.T)
            layer.quant_method.process_weights_after_loading(layer)  # a second time changes nothing
            assert torch.equal(layer.weight, want)


def test_a_packed_embedding_and_the_head_tied_to_it(config_class: Any, calibration: Path, tmp_path: Path) -> None:
    source = integer_models.source(tmp_path / "source")
    stage = {"quantize": {"method": "rtn", "bits": 4, "group": 32, "embeddings": 8}}
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, stage), source, tmp_path / "packed")
    ours, model = build_skeleton(open_checkpoint(tmp_path / "packed")), filled(config_class, tmp_path / "packed")
    want = ours.read("model.embed_tokens.weight")
    embedding, head = model.model.embed_tokens, model.lm_head  # type: ignore[union-attr]
    assert embedding.weight.shape[0] == 320 and torch.equal(embedding.weight[:288], want)  # type: ignore[index]
    assert head.weight is embedding.weight
    ids = torch.tensor([1, 5])
    assert torch.equal(embedding.quant_method.embedding(embedding, ids), want[ids])  # type: ignore[union-attr,operator]


def test_a_factor_that_is_shared_by_joined_layers() -> None:
    left, right = torch.randn(2, 8, 4).half(), torch.randn(4, 16).half()
    (spec, parts), lent = pack(LowRank(Dense(left[0]), Dense(right)), torch.float32), {"left_weight": left[1]}
    modules = {"a.q_proj": spec, "a.k_proj": {**spec, "shared": "a.q_proj"}}
    members, layer = vllm_plugin.members_of("a.qkv_proj", {"qkv_proj": QKV}, modules), nn.Module()
    vllm_plugin.create(layer, members, [8, 8, 8], 16, torch.float32)
    for shard, tensors in (("q", parts), ("k", lent), ("v", {"": torch.ones(8, 16)})):
        for part, tensor in tensors.items():
            parameter: Any = layer.get_parameter(f"weight_{part}" if part else "weight")
            parameter.weight_loader(parameter, tensor, shard)  # as models of older vLLM call it
    vllm_plugin.finish(layer, members)
    want = [LowRank(Dense(part), Dense(right)).dense() for part in left]
    assert torch.equal(layer.get_parameter("weight"), torch.cat([*want, torch.ones(8, 16)]))


def test_what_it_does_not_do_is_refused(config_class: Any, tmp_path: Path) -> None:
    source = integer_models.source(tmp_path / "source")
    folder = repacked.repack(source, tmp_path / "packed", integer_models.mixed)
    with pytest.raises(ValueError, match="set tensor_parallel_size=1"):
        model_of(opened(config_class, folder), ranks=2)
    model = model_of(opened(config_class, folder))
    with pytest.raises(ValueError, match=r"q_proj: .*(missing|lacks|no)"):
        vllm_stand_in.load_weights(model, [], STACKED)
    config = config_class.from_config({"modules": {"model.layers.0.mlp.experts.0.up_proj": {"format": "bitmask"}}})
    with pytest.raises(ValueError, match="with packed matrices, which is not supported"):
        config.get_quant_method(nn.Module(), "model.layers.0.mlp.experts")
    assert config.get_quant_method(nn.Module(), "model.layers.0.self_attn.attn") is None
    with pytest.raises(ValueError, match="update compressor"):
        config_class.from_config({"modules": {}, "format_version": 99})
    linear = {"linear_attention": {"layers": [0], "mixer": {}}}
    with pytest.raises((ValueError, TypeError)):
        config.maybe_update_config("x", hf_config=linear)
    lent = {"a.k_proj": {"format": "low-rank", "shared": "b.q_proj"}}
    with pytest.raises(ValueError, match="another layer of vLLM"):
        vllm_plugin.members_of("a.qkv_proj", {"qkv_proj": QKV}, lent)


def test_a_configuration_travels_to_other_processes(tmp_path: Path) -> None:
    folder = repacked.repack(integer_models.source(tmp_path / "source"), tmp_path / "packed", integer_models.mixed)
    config = AutoConfig.from_pretrained(folder)
    copied = pickle.loads(pickle.dumps(config))
    assert type(copied) is type(config) and copied.to_json_string() == config.to_json_string()


def test_the_plugin_is_light() -> None:
    code = "import sys, compressor.hf.vllm_plugin; sys.exit('transformers' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_signatures_are_those_of_vllm() -> None:
    """Where vLLM is. Elsewhere nothing says that the stand-in is like it, but for reading it."""
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    config = vllm_plugin.config_class()({"a": {"format": "bitmask", "shape": [2, 2]}})
    method = config.get_quant_method(LinearBase.__new__(LinearBase), "a")
    for ours, theirs in ((type(config), QuantizationConfig), (type(method), LinearMethodBase)):
        for name in set(vars(ours)) & set(dir(theirs)) - {"__init__", "embedding"}:
            if callable(getattr(ours, name)) and not name.startswith("__"):
                names = [list(inspect.signature(getattr(cls, name)).parameters) for cls in (ours, theirs)]
                assert names[0] == names[1], name
