"""How transformers reads a packed folder: the configuration, and the ordinary model class with packed layers.

A packed folder has the model type ``compressor``, so that transformers without this file refuses it rather than
filling the layers at random. :class:`CompressorConfig` reads ``base_model_type`` and hands out a configuration of that
family (a subclass of, say, ``LlamaConfig`` that differs only in how it is written to JSON), for which a subclass of
``LlamaForCausalLM`` is registered that refuses incomplete checkpoints. Inside ``from_pretrained`` the quantizer puts
packed layers where the manifest says so; everything else is the family's own code.
"""

from __future__ import annotations

import copy
import importlib
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from compressor.hf.experts import UnfusedExperts
from compressor.hf.linearized import linear_layers, linearize_model
from compressor.hf.manifest import FORMAT_VERSION, MODEL_TYPE, READER_AUTO_MAP, READER_NAME
from compressor.hf.quantizer import CompressorQuantizationConfig, CompressorQuantizer, some_of


class CompressorConfig(PreTrainedConfig):  # type: ignore[misc]
    """What ``model_type: compressor`` stands for; never instantiated, it makes a configuration of the base family."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the base family's configuration. ValueError when transformers does not know the family."""
        return packed_config_class(_base_model_type(config_dict)).from_dict(config_dict, **kwargs)


def _base_model_type(config_dict: dict[str, Any]) -> str:
    base = config_dict.get("base_model_type")
    if base == "mistral" and "layer_types" in config_dict:  # as AutoConfig reads the source's config.json
        base = "ministral"
    if base not in CONFIG_MAPPING:
        raise ValueError(f"base_model_type {base!r} in config.json is no model family this transformers knows")
    return str(base)


@cache
def packed_config_class(base_model_type: str) -> Any:
    """Return the subclass of a family's configuration that is written to JSON as a packed folder's config.

    It bears the name of its base, under which transformers finds the family's tokenizer and other models.
    """
    base: Any = CONFIG_MAPPING[base_model_type]

    class Config(base):  # type: ignore[misc]
        base_class = base

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """Return the configuration of a packed folder's config.json."""
            packed_only = ("model_type", "base_model_type", "auto_map", "base_auto_map")
            own = {key: copy.deepcopy(value) for key, value in config_dict.items() if key not in packed_only}
            if isinstance(manifest := own.get("quantization_config"), dict):
                manifest["quant_method"] = MODEL_TYPE
                if own.get("dtype", own.get("torch_dtype")) is None and manifest.get("modules"):
                    # else transformers takes it from the first float tensor, which may be a scale
                    own["dtype"] = _most_common([spec["dtype"] for spec in manifest["modules"].values()])
            return super().from_dict({**own, "model_type": base.model_type}, **kwargs)

        def to_diff_dict(self) -> dict[str, Any]:
            """Return what is written to config.json; ``to_dict`` is the family's, as PEFT and others expect it.

            The manifest is written without ``quant_method``: at an unknown one, ``LlamaForCausalLM.from_pretrained``
            without our code fills the layers at random and warns; when there is none it stops with an error.
            """
            own: dict[str, Any] = super().to_diff_dict()
            if (manifest := own.get("quantization_config")) is None:
                if not linear_layers(own):  # dequantized: an ordinary checkpoint
                    return own
                manifest = {"format_version": FORMAT_VERSION, "modules": {}}
            manifest = {key: value for key, value in manifest.items() if key != "quant_method"}
            ours = {"model_type": MODEL_TYPE, "base_model_type": base.model_type, "auto_map": dict(READER_AUTO_MAP)}
            return {**own, **ours, "quantization_config": manifest}

        def to_json_string(self, use_diff: bool = True) -> str:
            """Return the text of config.json, whatever ``use_diff`` says."""
            return str(super().to_json_string(use_diff=True))

        def __reduce__(self) -> tuple[Any, ...]:
            return _unpickled, (base_model_type, self.__dict__)

    _rename(Config, base)
    if base in MODEL_FOR_CAUSAL_LM_MAPPING:
        AutoModelForCausalLM.register(Config, packed_model_class(Config), exist_ok=True)
    return Config


def _unpickled(base_model_type: str, content: dict[str, Any]) -> Any:
    """Return a packed folder's configuration in another process: its class has no name there to be found by."""
    made = packed_config_class(base_model_type)
    config = made.__new__(made)
    config.__dict__.update(content)
    return config


@cache
def packed_model_class(config: Any) -> Any:
    """Return the subclass of a family's causal language model that reads and writes packed folders.

    Args:
        config: a class made by :func:`packed_config_class`.

    Raises:
        ValueError: the family's causal language model is built from another configuration (a part of a larger model).
    """
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config.base_class]
    if base.config_class is not config.base_class:
        raise ValueError(
            f"{base.__name__} is not built from a {config.__name__}, but from {base.config_class.__name__}"
        )

    class Model(base):  # type: ignore[misc]
        config_class = config

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            linearize_model(self)

        @classmethod
        def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
            """Load as the base class does; ValueError when a tensor is missing, instead of random values."""
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
            check_complete(info)
            return (model, info) if output_loading_info else model

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            """Save as the base class does, packed as it is, and the reader beside it; plain when dequantized.

            ValueError for a dequantized mixture of experts: the names of its parts are not those of the family's files.
            """
            packed = getattr(self.config, "quantization_config", None) is not None or bool(linear_layers(self.config))
            if not packed and any(isinstance(module, UnfusedExperts) for module in self.modules()):
                raise ValueError("a dequantized mixture of experts cannot be saved: save the packed model instead")
            result = super().save_pretrained(save_directory, *args, **kwargs)
            if packed and kwargs.get("is_main_process", True):
                (Path(save_directory) / READER_NAME).write_text(_reader_text(), encoding="utf-8")
            return result

        def __reduce_ex__(self, protocol: Any) -> Any:
            """Its class has no name in a module to be found by: pickle and ``torch.save`` write down how it is made."""
            _, _, *state = super().__reduce_ex__(max(protocol, 2))
            return _unpickled_model, (config.base_class.model_type,), *state

        # transformers finds these out by reading the source file of the class
        @classmethod
        def _can_set_attn_implementation(cls) -> bool:
            return bool(base._can_set_attn_implementation())

        @classmethod
        def _can_set_experts_implementation(cls) -> bool:
            return bool(base._can_set_experts_implementation())

    _rename(Model, base)
    return Model


def _unpickled_model(base_model_type: str) -> Any:
    """Return a model without content of the class for packed folders of a family; pickle fills it."""
    made = packed_model_class(packed_config_class(base_model_type))
    return made.__new__(made)


def _most_common(names: list[str]) -> str:
    return max(sorted(set(names)), key=names.count)


def _rename(made: type, base: type) -> None:
    made.__name__ = made.__qualname__ = base.__name__
    made.__doc__ = f"{base.__name__} with packed layers. {base.__doc__ or ''}"


def check_complete(info: dict[str, Any]) -> None:
    """Refuse a loaded model with tensors that no file filled, or files with packed tensors that no layer took.

    Args:
        info: what ``from_pretrained(output_loading_info=True)`` returns beside the model.

    Raises:
        ValueError: names the first of them.
    """
    missing = sorted(info["missing_keys"]) + sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if missing:
        raise ValueError(f"the checkpoint does not fill {some_of(missing)}; the folder is incomplete or damaged")
    ends = (".weight_mask", ".weight_values", ".weight_index", ".weight_codes", ".weight_scale", ".weight_zero")
    packed = sorted(name for name in info["unexpected_keys"] if name.endswith(ends))
    if packed:
        raise ValueError(f"packed tensors that config.json does not list: {some_of(packed)}")


class CompressorForCausalLM:
    """What ``auto_map`` names; loads the base family's causal language model with packed layers."""

    config_class = CompressorConfig

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the model, as ``AutoModelForCausalLM.from_pretrained`` does."""
        return AutoModelForCausalLM.from_pretrained(folder, *args, **kwargs)


def _reader_text() -> str:
    """Return the reader file: made by the package, or this very file when it is the one that travelled."""
    if __name__ == "compressor.hf.loading":
        return str(importlib.import_module("compressor.hf.reader").reader_source())
    return Path(__file__).read_text(encoding="utf-8")


def register() -> None:
    """Teach transformers the model type and the quantization method ``compressor``. May be called again."""
    AutoConfig.register(MODEL_TYPE, CompressorConfig, exist_ok=True)
    # the decorators of transformers refuse a second registration, which two readers in one process would make
    AUTO_QUANTIZATION_CONFIG_MAPPING[MODEL_TYPE] = CompressorQuantizationConfig
    AUTO_QUANTIZER_MAPPING[MODEL_TYPE] = CompressorQuantizer
