"""Group integers as stock transformers and vLLM read them: ``quantization_config`` of compressed-tensors, and back.

Only the JSON is made here, without that package: the tensors are the parts of `compressor.formats.group_int`.

What its readers make of the JSON (compressed-tensors 0.20, transformers 5.24):

- A module takes the scheme of the group that names it, whole or by ``re:`` and an expression that is matched from the
  start. Names are those of modules in the model. ``ignore`` is for vLLM, which wants to hear of every linear layer.
- Every target is tried on every module. So modules that differ only in their numbers are named by one expression,
  in which the first part is optional: a model without its head has shorter names.
- transformers reads all experts of all mixtures by one scheme, that of the first group with an expression about
  "experts", and stops where they are not packed.
- Zero points are read only with ``CompressedTensorsConfig(dequantize=True)``, which in turn reads every matrix by one
  and the same scheme, even where there are several.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compressor.errors import UserError
from compressor.formats.group_int import layout_group_int
from compressor.formats.parts import Spec
from compressor.formats.registry import tensor_name

QUANT_METHOD = "compressed-tensors"
PACKED_FORMAT = "pack-quantized"
EXPERT = re.compile(r"(^|\.)experts\.\d+\.")

Scheme = tuple[int, int | None, bool]
"""(bits, inputs a group or None for whole rows, symmetric)."""


def quantization_config(modules: Mapping[str, Spec], left_out: Iterable[str] = ()) -> dict[str, Any]:
    """Return the ``quantization_config`` of config.json for a folder of group integers.

    Args:
        modules: module path -> its ``group-int`` spec, for every matrix that is stored so.
        left_out: module paths of all other linear layers, ``lm_head`` among them.

    Raises:
        UserError: the experts of mixtures are not all stored alike.
        ValueError: there is no module, or one of another format.
    """
    if not modules:
        raise ValueError("no module is quantized")
    schemes = _schemes(modules)
    ignore = sorted(set(left_out) - set(modules))
    _check_experts(schemes, ignore)
    experts_first = sorted(schemes.items(), key=lambda item: not any(map(EXPERT.search, item[1])))
    return {
        "quant_method": QUANT_METHOD,
        "format": PACKED_FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": _targets(names, {*modules, *ignore} - set(names)),
                "weights": _weights(*scheme),
                "input_activations": None,
                "output_activations": None,
                "format": PACKED_FORMAT,
            }
            for number, (scheme, names) in enumerate(experts_first)
        },
        "ignore": ignore,
    }


def is_group_int(config: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is of the kind that `group_int_specs` reads: packed integers, weights only."""
    groups = config.get("config_groups") or {}
    return (
        (config.get("quant_method"), config.get("format")) == (QUANT_METHOD, PACKED_FORMAT)
        and not config.get("kv_cache_scheme")
        and all(isinstance(group, Mapping) and not group.get("input_activations") for group in groups.values())
    )


def group_int_specs(
    config: Mapping[str, Any],
    headers: Mapping[str, tuple[str, Sequence[int]]],
    shapes: Mapping[str, Sequence[int]],
    dtype: str,
) -> dict[str, Spec]:
    """Return module path -> spec for the packed matrices of a folder that `quantization_config` describes.

    Args:
        config: ``quantization_config`` of config.json.
        headers: name -> (dtype name such as ``bfloat16``, shape) of every stored tensor, named after the modules.
        shapes: module path -> (m, n), from the model or from the values of ``weight_shape``: what is packed does not
            tell n.
        dtype: name of the dtype of the model, as in config.json.

    Raises:
        UserError: another method or format, or a tensor that is not as the config says.
    """
    if not is_group_int(config):
        found = f"{config.get('quant_method')} in format {config.get('format')}"
        raise UserError(f"the model is quantized by {found}; only {QUANT_METHOD} in {PACKED_FORMAT} can be read")
    specs: dict[str, Spec] = {}
    for module in sorted(name.removesuffix(".weight_packed") for name in headers if name.endswith(".weight_packed")):
        weights = _find(module, config)
        group = weights.get("group_size") if weights.get("strategy") == "group" else shapes[module][1]
        spec = {
            "format": "group-int",
            "shape": list(shapes[module]),
            "dtype": dtype,
            "bits": weights["num_bits"],
            "group": group,
            "symmetric": weights.get("symmetric", True),
        }
        _check_headers(module, spec, headers)
        specs[module] = spec
    return specs


def _schemes(modules: Mapping[str, Spec]) -> dict[Scheme, list[str]]:
    """Return scheme -> module paths, with as few schemes as can be: a whole row is also a group as wide as the row."""
    schemes: dict[Scheme, list[str]] = {}
    for name, spec in modules.items():
        if spec["format"] != "group-int":
            raise ValueError(f"{name} is stored as {spec['format']}, which {QUANT_METHOD} does not know")
        if spec["group"] < spec["shape"][1]:
            schemes.setdefault((spec["bits"], spec["group"], spec["symmetric"]), []).append(name)
    for name, spec in modules.items():
        if spec["group"] == spec["shape"][1]:
            wide = (spec["bits"], spec["group"], spec["symmetric"])
            schemes.setdefault(wide if wide in schemes else (wide[0], None, wide[2]), []).append(name)
    return schemes


def _check_experts(schemes: Mapping[Scheme, Sequence[str]], ignore: Iterable[str]) -> None:
    packed = [scheme for scheme, names in schemes.items() if any(map(EXPERT.search, names))]
    if len(packed) > 1:
        words = ", ".join(f"{bits} bits by {width or 'row'}" for bits, width, _ in packed)
        raise UserError(
            f"experts with different grids ({words}) cannot be stored as {QUANT_METHOD}, whose readers take them alike",
            fix="choose --bits and --group such that all experts get the same",
        )
    if (dense := next(filter(EXPERT.search, ignore), None)) is not None:
        raise UserError(
            f"{dense} is not quantized; readers of {QUANT_METHOD} expect all experts to be", fix="quantize all experts"
        )


def _weights(bits: int, width: int | None, symmetric: bool) -> dict[str, Any]:
    strategy = "channel" if width is None else "group"
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": width}


def _targets(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return targets that match all ``names`` and no ``others``: one expression for those that differ in numbers."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_expression(name), []).append(name)
    targets = []
    for expression, alike in kinds.items():
        common = not any(re.match(expression, name) for name in others)
        targets += [f"re:{expression}"] if common else alike
    return targets


def _expression(name: str) -> str:
    parts = [r"\d+" if part.isdigit() else re.escape(part) for part in name.split(".")]
    if len(parts) > 2 and r"\d+" not in parts[:2]:
        parts[:2] = [rf"({parts[0]}\.)?{parts[1]}"]
    return r"\.".join(parts) + "$"


def _find(module: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the ``weights`` of the scheme of a module: named whole, by expression, or as a linear layer."""
    groups = config.get("config_groups", {}).values()
    targets = [(target, group["weights"]) for group in groups for target in group["targets"]]
    for target, weights in sorted(targets, key=lambda item: ("re:" in item[0], item[0] == "Linear", item[0])):
        if target in (module, "Linear") or (target.startswith("re:") and re.match(target[3:], module)):
            return weights  # type: ignore[no-any-return]
    if EXPERT.search(module):  # which may have another name in the file than in the model
        for target, weights in targets:
            if target.startswith("re:") and "experts" in target:
                return weights  # type: ignore[no-any-return]
    raise UserError(f"{module} is packed, but no group of quantization_config names it")


def _check_headers(module: str, spec: Spec, headers: Mapping[str, tuple[str, Sequence[int]]]) -> None:
    for part, (shape, dtype) in layout_group_int(spec).items():
        name, expected = tensor_name(module, part), (str(dtype).removeprefix("torch."), shape)
        if name not in headers:
            raise UserError(f"the checkpoint has no {name}, which quantization_config asks for")
        found = (headers[name][0], tuple(headers[name][1]))
        if found != expected:
            raise UserError(f"{name} is {found[0]} {list(found[1])}, expected {expected[0]} {list(expected[1])}")
