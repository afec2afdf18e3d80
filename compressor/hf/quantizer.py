"""Puts packed layers into a model that transformers is about to fill, once the files are known to fit the manifest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compressor.formats.parts import Spec
from compressor.formats.registry import format_of, tensor_name
from compressor.hf.embedding import TiedHead, is_packed_embedding, pack_embedding
from compressor.hf.experts import unfuse
from compressor.hf.linear import PackedLinear, replacement
from compressor.hf.manifest import FORMAT_VERSION, MODEL_TYPE

SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "U8": "uint8",
    "I32": "int32",
    "I64": "int64",
}


class CompressorQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a packed folder: the manifest.

    Args:
        modules: module path -> spec of its weight.
        format_version: of the manifest; a newer one is refused.
    """

    def __init__(
        self, modules: dict[str, Spec] | None = None, format_version: int = FORMAT_VERSION, **unknown: Any
    ) -> None:
        unknown.pop("quant_method", None)
        if format_version > FORMAT_VERSION or unknown:
            what = f"format_version {format_version}" if format_version > FORMAT_VERSION else f"{sorted(unknown)}"
            raise ValueError(
                f"quantization_config has {what}, this reader knows version {FORMAT_VERSION}: update compressor"
            )
        self.quant_method = MODEL_TYPE
        self.format_version = format_version
        self.modules = modules or {}


class CompressorQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed layers into a model that transformers is about to fill."""

    requires_calibration = True

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """A packed model can be saved as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained beside packed layers."""
        return True

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Return no conversions: a packed folder has the names of the modules, with experts apart."""
        return []

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        modules: dict[str, Spec] = self.quantization_config.modules
        check_files(checkpoint_files, modules)
        unfuse(model)
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        for listed, spec in modules.items():
            name = _in_model(model, listed)
            if name is None:
                continue
            try:
                if isinstance(model.get_submodule(name), nn.Embedding):
                    _pack_embedding(model, name, spec)
                    continue
                if f"{name}.weight" in tied:
                    raise ValueError("is packed but its weight is tied in this model: pack neither end")
                model.set_submodule(name, replacement(model.get_submodule(name), spec))
            except ValueError as error:
                raise ValueError(f"{listed} {error}") from error

        _lend(model, modules)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                try:
                    module.check()
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                dense.weight = nn.Parameter(module.unpacked().to(dtype or module.compute_dtype))
                dense.bias = module.bias
                model.set_submodule(name, dense)
        _dequantize_embeddings(model, dtype)
        return model


def _lend(model: PreTrainedModel, modules: dict[str, Spec]) -> None:
    """Tell layers that share a factor which other one holds it."""
    for listed, spec in modules.items():
        if "shared" in spec and (name := _in_model(model, listed)) is not None:
            lender = _in_model(model, spec["shared"])
            if lender is None:
                raise ValueError(f"{listed} needs {spec['shared']}, which the model does not have")
            cast(PackedLinear, model.get_submodule(name)).lender = [cast(PackedLinear, model.get_submodule(lender))]


def _dequantize_embeddings(model: PreTrainedModel, dtype: Any) -> None:
    """Put ordinary embeddings in place of packed ones, and heads tied to them in place of their users."""
    heads = [(name, module) for name, module in model.named_modules() if isinstance(module, TiedHead)]
    for name, module in list(model.named_modules()):
        if is_packed_embedding(module):
            plain = cast(Any, module).plain(dtype)
            model.set_submodule(name, plain)
            for path, head in heads:
                if head.shares(module):
                    model.set_submodule(path, head.plain(plain))
                    model.all_tied_weights_keys[f"{path}.weight"] = f"{name}.weight"


def _pack_embedding(model: PreTrainedModel, name: str, spec: Spec) -> None:
    """Put a packed embedding into ``model``, and a head that uses it in place of one whose weight is tied to it."""
    embedding = pack_embedding(model.get_submodule(name), spec)
    model.set_submodule(name, embedding)
    for target, source in list(model.all_tied_weights_keys.items()):
        if f"{name}.weight" in (target, source):
            other = (source if target == f"{name}.weight" else target).removesuffix(".weight")
            model.set_submodule(other, TiedHead(embedding, model.get_submodule(other)))
            del model.all_tied_weights_keys[target]


def _in_model(model: PreTrainedModel, name: str) -> str | None:
    """Return the path of a listed module in ``model``; None when ``model`` is only the body and lacks it.

    ``AutoModel`` and the like load the body alone, under paths without its prefix.
    """
    for path in (name, name.removeprefix(f"{model.base_model_prefix}.")):
        try:
            model.get_submodule(path)
            return path
        except AttributeError:
            continue
    if model.can_generate():
        raise ValueError(f"config.json lists {name}, but the model has no such module")
    return None


def check_files(files: Iterable[str] | None, modules: dict[str, Spec]) -> None:
    """Refuse a folder whose files do not hold the packed tensors of the manifest, before anything is loaded.

    Args:
        files: the checkpoint's files; nothing is checked unless they are safetensors.
        modules: the manifest.

    Raises:
        ValueError: names the first tensor that is missing, or of another shape or dtype than its spec says.
    """
    files = list(files or ())
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                header = tensors.get_slice(name)
                found[name] = (tuple(header.get_shape()), SAFETENSORS_DTYPES.get(header.get_dtype(), "other"))
    expected = {
        tensor_name(module, part): (shape, str(dtype).removeprefix("torch."))
        for module, spec in modules.items()
        for part, (shape, dtype) in format_of(spec).layout(spec).items()
    }
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ValueError(f"the checkpoint has no {some_of(missing)}, which config.json lists; the folder is damaged")
    for name, entry in expected.items():
        if found[name] != entry:
            raise ValueError(f"{name} is {list(found[name][0])} {found[name][1]}, expected {list(entry[0])} {entry[1]}")


def some_of(names: list[str]) -> str:
    """Return the first of several tensor names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
