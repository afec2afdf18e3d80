"""The model without its weights: where its decoder blocks are, which linears they hold, which file tensor feeds what.

Architecture facts are few and stand in the tables here; everything else is found generically.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compressor.engine.checkpoint import Checkpoint
from compressor.engine.imports import uncollected
from compressor.engine.names import candidates, fused_origin, plain_name
from compressor.errors import UserError
from compressor.formats.parts import Spec, parse_dtype
from compressor.formats.registry import borrowed, format_of, tensor_name
from compressor.formats.representation import Representation, unpack
from compressor.hf.compressed_tensors import group_int_specs, is_group_int
from compressor.hf.experts import unfuse
from compressor.hf.linearized import linearize_model
from compressor.hf.reader import source_config

# Parts of a block that choose or scale rather than carry the signal: a few rows each, never worth compressing.
NOT_COMPRESSED = re.compile(r"(^|\.)(gate|router|shared_expert_gate|classifier)$")


@dataclass(frozen=True)
class Origin:
    """Where a module tensor comes from: a checkpoint tensor, a slice of a fused one, or a packed matrix."""

    name: str
    index: tuple[int | slice, ...] = ()
    packed: bool = False


@dataclass(frozen=True)
class Linear:
    """A weight matrix of a decoder block. ``shape`` is (out, in); ``transposed`` marks GPT-2's (in, out) storage."""

    name: str  # module path in the model
    block: int
    shape: tuple[int, int]
    transposed: bool
    dtype: torch.dtype  # as stored in the checkpoint

    @property
    def kind(self) -> str:
        """Path inside the block without expert numbers: ``self_attn.q_proj``, ``mlp.experts.*.up_proj``."""
        return re.sub(r"\.\d+\.", ".*.", self.name.split(".", _depth(self.name))[-1])


def _depth(name: str) -> int:
    parts = name.split(".")
    return next(i for i, part in enumerate(parts) if part.isdigit()) + 1


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, tied to the checkpoint that can fill it.

    Attributes:
        model: the transformers model; every parameter on the meta device, buffers that are not stored are real.
        blocks: the decoder blocks in order, and ``block_names`` their module paths.
        linears: every compressible matrix, in order of execution depth.
        origins: module tensor name -> where its data lies in the checkpoint.
        tied: module tensor name -> the name of the tensor it shares.
        extra: checkpoint tensors that the model does not know; they are carried over.
        experts: module paths of the mixtures of experts.
        packed: manifest entries of a source that compressor has written.
    """

    checkpoint: Checkpoint
    config: Any
    model: Any
    block_names: tuple[str, ...]
    linears: tuple[Linear, ...]
    origins: dict[str, Origin]
    tied: dict[str, str]
    extra: tuple[str, ...]
    experts: tuple[str, ...]
    packed: dict[str, Spec]

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks, in order."""
        return [self.model.get_submodule(name) for name in self.block_names]

    def outer_tensors(self) -> list[str]:
        """Names of the stored module tensors outside the blocks (embeddings, final norm, head), tied ones once."""
        prefixes = tuple(name + "." for name in self.block_names)
        return [name for name in self.origins if not name.startswith(prefixes)]

    def block_tensors(self, block: int) -> list[str]:
        """Names of the stored module tensors of one block."""
        prefix = self.block_names[block] + "."
        return [name for name in self.origins if name.startswith(prefix)]

    def read(self, name: str) -> Tensor:
        """Read a module tensor in its stored dtype and module layout."""
        origin = self.origins[name]
        if origin.packed:
            weight = self.representation(origin.name).dense().to(parse_dtype(self.packed[origin.name]["dtype"]))
            return weight.T.contiguous() if self.is_transposed(name) else weight
        return self.checkpoint.read(origin.name, origin.index)

    def representation(self, module: str) -> Representation:
        """Read a packed matrix as it was packed. ``module`` is one of :attr:`packed`."""
        return unpack(self.packed[module], self.read_parts(module))

    def read_parts(self, module: str) -> dict[str, Tensor]:
        """Read the parts of a packed matrix, those included that are stored beside another one."""
        spec = self.packed[module]
        own = {part: self.checkpoint.read(tensor_name(module, part)) for part in format_of(spec).layout(spec)}
        return own | (borrowed(spec, self.read_parts(spec["shared"])) if "shared" in spec else {})

    def stored(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Stored dtype and module shape of a tensor, from the headers."""
        origin = self.origins[name]
        if origin.packed:
            dtype = parse_dtype(self.packed[origin.name]["dtype"])
        else:
            dtype = self.checkpoint.tensors[origin.name].dtype
        return dtype, tuple(self._meta_tensor(name).shape)

    def source_name(self, name: str) -> str:
        """The name of a module tensor in a plain checkpoint like the source."""
        if self.checkpoint.config.get("model_type") == "compressor" or self.origins[name].packed:
            return plain_name(name, self.config.model_type)
        return self.origins[name].name

    def source_layout(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of the source tensor that holds a module tensor."""
        origin = self.origins[name]
        if not origin.index:
            return self.stored(name)
        entry = self.checkpoint.tensors[origin.name]
        return entry.dtype, entry.shape

    def all_linears(self) -> list[str]:
        """Module paths of every linear layer of the model, head and routers included."""
        return [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]

    def parameters(self) -> int:
        """Number of distinct stored parameters of the model."""
        return sum(self._meta_tensor(name).numel() for name in self.origins)

    def is_transposed(self, name: str) -> bool:
        from transformers.pytorch_utils import Conv1D

        return isinstance(self.model.get_submodule(name.rpartition(".")[0]), Conv1D)

    def _meta_tensor(self, name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        tensor = getattr(self.model.get_submodule(module), leaf)
        assert isinstance(tensor, Tensor)
        return tensor


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the transformers configuration of a folder, refusing what is no causal language model.

    Raises:
        UserError: unknown architecture, remote code that was not allowed, or an encoder-decoder model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        if stored.get("model_type") == "compressor":
            plain = source_config(stored)
            return CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
        if stored.get("quantization_config"):
            if not is_group_int(stored["quantization_config"]):
                named = stored["quantization_config"].get("quant_method")
                named = named or ("mlx" if "quantization" in stored else "?")
                raise UserError(
                    f"{folder.name} is already quantized ({named})", fix="give the folder or model it was made from"
                )
            plain = source_config(stored)
            return CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except UserError:
        raise
    except Exception as error:
        remedy = "--trust-remote-code" if "trust_remote_code" in str(error) else "a newer transformers may know it"
        first = str(error).strip().splitlines()[0]
        raise UserError(f"transformers cannot read the configuration of {folder.name}: {first}", fix=remedy) from error
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{folder.name} is an encoder-decoder model ({config.model_type}), expected a decoder-only causal LM",
            fix="compressor handles what AutoModelForCausalLM handles",
        )
    return config


@uncollected()  # transformers is imported here, as a rule
def build_skeleton(checkpoint: Checkpoint, *, trust_remote_code: bool = False, config: Any = None) -> Skeleton:
    """Build the model of a checkpoint without weights and match it with the headers.

    Raises:
        UserError: no causal LM, no decoder blocks found, a tensor is missing or has the wrong shape.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = config or load_config(checkpoint.folder, trust_remote_code=trust_remote_code)
    try:
        with init_empty_weights(include_buffers=False), _EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
            linearize_model(model)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{checkpoint.folder.name} ({config.model_type}) cannot be built as a causal LM: {first}",
            fix="compressor handles what AutoModelForCausalLM handles",
        ) from error
    model.tie_weights()  # moving parameters to the meta device has parted them
    model.eval()
    model.requires_grad_(False)
    experts = unfuse(model)
    block_names = find_blocks(model)
    tied = _tied_names(model)
    stored = [name for name in model.state_dict() if name not in tied]
    packed = _manifest(checkpoint)
    origins = _match(stored, tied, model, checkpoint, packed)
    parts = {tensor_name(module, part) for module, spec in packed.items() for part in format_of(spec).layout(spec)}
    used = {origin.name for origin in origins.values()} | parts | _stored_twice(tied, model, checkpoint)
    extra = tuple(sorted(set(checkpoint.tensors) - used))
    skeleton = Skeleton(checkpoint, config, model, block_names, (), origins, tied, extra, tuple(experts), packed)
    return replace(skeleton, linears=_find_linears(skeleton))


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters are born on the meta device. Made for real and then moved, they would never be touched, but the holes
    they leave in the address space would grow with the number of blocks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Find the decoder blocks: the module list with the most parameters that is not inside another one."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not re.search(r"\.\d+(\.|$)", name)
    ]
    if not lists:
        raise UserError(f"found no decoder blocks in {type(model).__name__}", fix="this architecture is not supported")
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return tuple(f"{name}.{i}" for i in range(len(blocks)))


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Map every further name of a shared parameter to its first name."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return tied


def _manifest(checkpoint: Checkpoint) -> dict[str, Spec]:
    """The packed matrices of a source that compressor has written, checked against the headers."""
    stored = checkpoint.config.get("quantization_config")
    if stored and is_group_int(stored):
        return _group_integers(checkpoint, stored)
    if checkpoint.config.get("model_type") != "compressor":
        return {}
    try:
        modules: dict[str, Spec] = checkpoint.config["quantization_config"]["modules"]
        layouts = {module: format_of(spec).layout(spec) for module, spec in modules.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{checkpoint.folder.name}: the manifest in config.json cannot be read ({error})",
            fix="make the checkpoint again, or update compressor",
        ) from error
    for module, layout in layouts.items():
        for part, (shape, dtype) in layout.items():
            entry = checkpoint.tensors.get(tensor_name(module, part))
            if entry is None or (entry.shape, entry.dtype) != (shape, dtype):
                raise UserError(
                    f"{checkpoint.folder.name}: packed tensor {tensor_name(module, part)!r} is missing or does not fit "
                    "the manifest in config.json",
                    fix="fetch or make the checkpoint again",
                )
    return modules


def _group_integers(checkpoint: Checkpoint, stored: dict[str, Any]) -> dict[str, Spec]:
    """The packed matrices of a source in the layout of compressed-tensors."""
    headers = {
        name: (str(entry.dtype).removeprefix("torch."), entry.shape) for name, entry in checkpoint.tensors.items()
    }
    suffix = ".weight_shape"
    shapes = {name.removesuffix(suffix): checkpoint.read(name).tolist() for name in headers if name.endswith(suffix)}
    scales = {dtype for name, (dtype, _) in headers.items() if name.endswith(".weight_scale")}
    return group_int_specs(stored, headers, shapes, scales.pop() if len(scales) == 1 else "float32")


def _match(
    names: list[str], tied: dict[str, str], model: Any, checkpoint: Checkpoint, packed: dict[str, Spec]
) -> dict[str, Origin]:
    prefix = getattr(model, "base_model_prefix", "")
    meta = model.state_dict()
    origins: dict[str, Origin] = {}
    for name in names:
        if name.removesuffix(".weight") in packed:
            origins[name] = Origin(name.removesuffix(".weight"), packed=True)
            continue
        aliases = [name, *(alias for alias, first in tied.items() if first == name)]
        origin = next((found for alias in aliases if (found := _find(alias, prefix, checkpoint))), None)
        if origin is None:
            raise UserError(
                f"{checkpoint.folder.name} lacks the tensor {name!r} of shape {list(meta[name].shape)}",
                fix="the checkpoint is incomplete or does not fit its config.json",
            )
        entry = checkpoint.tensors[origin.name]
        shape = tuple(torch.empty(entry.shape, device="meta")[origin.index].shape) if origin.index else entry.shape
        if shape != tuple(meta[name].shape):
            raise UserError(
                f"tensor {origin.name!r} has shape {list(shape)}, config.json asks for {list(meta[name].shape)}",
                fix="the checkpoint does not fit its config.json",
            )
        if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
            raise UserError(
                f"tensor {origin.name!r} is stored as {str(entry.dtype).removeprefix('torch.')}, "
                "expected float32, float16, bfloat16 or float64",
                fix="start from the unquantized checkpoint",
            )
        origins[name] = origin
    return origins


def _find(name: str, prefix: str, checkpoint: Checkpoint) -> Origin | None:
    for candidate in candidates(name, prefix):
        if candidate in checkpoint.tensors:
            return Origin(candidate)
    if fused := fused_origin(name):
        for candidate in candidates(fused[0], prefix):
            if candidate in checkpoint.tensors:
                return Origin(candidate, fused[1](checkpoint.tensors[candidate].shape))
    return None


def _stored_twice(tied: dict[str, str], model: Any, checkpoint: Checkpoint) -> set[str]:
    """Checkpoint copies of tied tensors: not carried over, since the model has one tensor for both.

    Raises:
        UserError: the copies differ, so that dropping one would change the model.
    """
    prefix = getattr(model, "base_model_prefix", "")
    copies = set()
    for name, first in tied.items():
        copy, original = _find(name, prefix, checkpoint), _find(first, prefix, checkpoint)
        if copy is None or original is None:
            continue
        if not torch.equal(checkpoint.read(copy.name), checkpoint.read(original.name)):
            raise UserError(
                f"config.json ties {copy.name!r} to {original.name!r}, but the checkpoint stores different values",
                fix="set tie_word_embeddings to false in config.json, or remove the wrong tensor",
            )
        copies.add(copy.name)
    return copies


def _find_linears(skeleton: Skeleton) -> tuple[Linear, ...]:
    from transformers.pytorch_utils import Conv1D

    linears = []
    for index, block_name in enumerate(skeleton.block_names):
        for path, module in skeleton.model.get_submodule(block_name).named_modules():
            name = f"{block_name}.{path}"
            if not isinstance(module, (nn.Linear, Conv1D)) or NOT_COMPRESSED.search(name):
                continue
            if f"{name}.weight" in skeleton.tied or f"{name}.weight" in skeleton.tied.values():
                continue
            dtype, (rows, columns) = skeleton.stored(f"{name}.weight")
            transposed = isinstance(module, Conv1D)
            shape = (columns, rows) if transposed else (rows, columns)
            linears.append(Linear(name, index, shape, transposed, dtype))
    if not linears:
        raise UserError(
            f"{type(skeleton.model).__name__} has no linear layers in its blocks", fix="this model is not supported"
        )
    return tuple(linears)
