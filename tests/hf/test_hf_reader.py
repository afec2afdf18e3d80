"""The reader file and config.json, as text and as data."""

from __future__ import annotations

import ast

import pytest

from compressor import __version__
from compressor.errors import UserError
from compressor.hf import loading
from compressor.hf.quantizer import CompressorQuantizationConfig
from compressor.hf.reader import READER_AUTO_MAP, READER_NAME, packed_config, reader_source, source_config

SPEC = {"format": "bitmask", "shape": [4, 4], "dtype": "float32", "nnz": 8}


def test_reader_is_one_self_contained_module() -> None:
    source = reader_source()
    reader_source.cache_clear()
    assert reader_source() == source and __version__ in source.splitlines()[0]
    tree = ast.parse(source)
    assert "compressor" in (ast.get_docstring(tree) or "")
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or ".").split(".")[0])
    assert "compressor" not in modules and {"torch", "transformers", "safetensors"} <= modules
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names += [
        node.targets[0].id
        for node in tree.body
        if isinstance(node, ast.Assign)
        if isinstance(node.targets[0], ast.Name)
    ]
    assert len(names) == len(set(names)), "two files of the package define the same name"
    assert {"CompressorConfig", "CompressorForCausalLM", "PackedLinear", "UnfusedExperts"} <= set(names)
    for reference in READER_AUTO_MAP.values():
        module, name = reference.split(".")
        assert f"{module}.py" == READER_NAME and name in names


def test_packed_config_and_back() -> None:
    source = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "torch_dtype": "float16"}
    packed = packed_config(source, {"a.b": SPEC})
    assert packed["model_type"] == "compressor" and packed["base_model_type"] == "llama"
    assert packed["architectures"] == ["LlamaForCausalLM"] and packed["hidden_size"] == 8
    assert packed["auto_map"] == READER_AUTO_MAP
    assert packed["quantization_config"] == {"format_version": 1, "modules": {"a.b": SPEC}}
    assert source_config(packed) == source
    assert source_config(source) == source
    remote = {**source, "auto_map": {"AutoConfig": "configuration_x.X"}}
    assert source_config(packed_config(remote, {})) == remote
    assert packed_config({**source, "quantization_config": None}, {})["quantization_config"]["modules"] == {}


def test_sources_that_cannot_be_packed() -> None:
    with pytest.raises(UserError, match="already quantized"):
        packed_config({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, {})
    with pytest.raises(UserError, match="no model_type"):
        packed_config({"hidden_size": 8}, {})


def test_unknown_families_and_manifests_are_refused() -> None:
    with pytest.raises(ValueError, match="base_model_type 'nonesuch'"):
        loading.CompressorConfig.from_dict({"base_model_type": "nonesuch"})
    with pytest.raises(ValueError, match="format_version 2"):
        CompressorQuantizationConfig(format_version=2)
    with pytest.raises(ValueError, match="colour"):
        CompressorQuantizationConfig(colour="red")


def test_dtype_comes_from_the_manifest_when_the_config_has_none() -> None:
    packed = packed_config({"model_type": "llama"}, {"a": {**SPEC, "dtype": "bfloat16"}})
    assert str(loading.CompressorConfig.from_dict(packed).dtype) == "torch.bfloat16"
    packed["torch_dtype"] = "float16"
    assert str(loading.CompressorConfig.from_dict(packed).dtype) == "torch.float16"


def test_mistral_with_layer_types_is_what_transformers_makes_of_it() -> None:
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    packed = packed_config({"model_type": "mistral", **layers}, {})
    assert loading.CompressorConfig.from_dict(packed).model_type == "ministral"
    assert loading.CompressorConfig.from_dict(packed_config({"model_type": "mistral"}, {})).model_type == "mistral"
