"""What travels with a packed checkpoint beside its tensors: the self-contained reader file, and config.json."""

from __future__ import annotations

import ast
from functools import cache
from importlib.resources import files
from typing import Any

from compressor.errors import UserError
from compressor.formats.parts import Spec
from compressor.hf.compressed_tensors import is_group_int
from compressor.hf.manifest import FORMAT_VERSION, MODEL_TYPE, READER_AUTO_MAP, READER_NAME

READER_MODULES = (
    "formats/parts.py",
    "formats/bits.py",
    "formats/dense.py",
    "formats/bitmask.py",
    "formats/nm.py",
    "formats/sparse_int.py",
    "formats/group_int.py",
    "formats/trits.py",
    "formats/trit_planes.py",
    "formats/mask_codes.py",
    "formats/partial_binary.py",
    "formats/scaled_binary.py",
    "formats/leaf.py",
    "formats/low_rank.py",
    "formats/sum.py",
    "formats/registry.py",
    "hf/manifest.py",
    "hf/linear.py",
    "hf/embedding.py",
    "hf/experts.py",
    "hf/quantizer.py",
    "mixers/spec.py",
    "mixers/chunked.py",
    "mixers/fla.py",
    "mixers/maps.py",
    "mixers/decays.py",
    "hf/linear_cache.py",
    "hf/linear_kernels.py",
    "hf/linear_attention.py",
    "hf/linearized.py",
    "hf/loading.py",
)
HEADER = '''"""Reads a checkpoint written by compressor {version}: pure PyTorch, no installation needed.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Made from the sources of the package, file by file; with the package installed, `import compressor` replaces it.
"""
'''


__all__ = ["READER_AUTO_MAP", "READER_NAME", "packed_config", "reader_source", "source_config"]


@cache
def reader_source() -> str:
    """Return the text of the reader file: the formats and the loading code in one module. Deterministic."""
    from compressor import __version__

    imports: set[str] = set()
    bodies = []
    for name in READER_MODULES:
        source = (files("compressor") / name).read_text(encoding="utf-8")
        found, body = _split(source)
        imports |= found
        bodies.append(f"# compressor/{name}\n\n{body.strip()}\n")
    plain = sorted(line for line in imports if not line.startswith("from __future__"))
    head = [HEADER.format(version=__version__), "from __future__ import annotations", "\n".join(plain)]
    return "\n\n".join([*head, *bodies, "register()\n"])


def _split(source: str) -> tuple[set[str], str]:
    """Return the imports of other packages at the top of a module, one statement a line, and the rest without them."""
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    imports = set()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("compressor")):
                imports |= {_one_import(node, alias) for alias in node.names}
            _replace(lines, node, "")
    if (docstring := ast.get_docstring(tree)) is not None:
        _replace(lines, tree.body[0], "".join(f"# {line}".rstrip() + "\n" for line in docstring.splitlines()))
    return imports, "".join(lines)


def _replace(lines: list[str], node: ast.stmt, text: str) -> None:
    first, last = node.lineno - 1, node.end_lineno or node.lineno
    lines[first:last] = [text] + [""] * (last - first - 1)


def _one_import(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> str:
    name = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
    return f"import {name}" if isinstance(node, ast.Import) else f"from {node.module} import {name}"


def packed_config(config: dict[str, Any], modules: dict[str, Spec]) -> dict[str, Any]:
    """Return the content of a packed folder's config.json.

    Args:
        config: that of the source, as read from its config.json.
        modules: module path -> spec, for every weight that is packed (dense ones may be left out).

    Returns:
        A new dict. Its ``quantization_config`` has no ``quant_method``, so that transformers without our code stops
        with an error wherever it gets at the folder (see ``to_diff_dict`` in ``loading.py``).

    Raises:
        UserError: the source is itself quantized, or of a family that only its own code can build.
    """
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise UserError(f"the source model is already quantized ({method})", fix="start from the original model")
    if "model_type" not in config:
        raise UserError("config.json has no model_type", fix="--save dense writes a plain checkpoint instead")
    own = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    if "auto_map" in config:
        own["base_auto_map"] = config["auto_map"]
    return {
        **own,
        "model_type": MODEL_TYPE,
        "base_model_type": config["model_type"],
        "auto_map": dict(READER_AUTO_MAP),
        "quantization_config": {
            "format_version": FORMAT_VERSION,
            "modules": {name: dict(spec) for name, spec in modules.items()},
        },
    }


def source_config(packed: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of the model a packed folder was made from: the inverse of :func:`packed_config`.

    A config that is not a packed folder's is returned as it is, but without integers of compressed-tensors.
    """
    if packed.get("model_type") != MODEL_TYPE:
        integers = is_group_int(packed.get("quantization_config") or {})
        return {key: value for key, value in packed.items() if not (integers and key == "quantization_config")}
    ours = ("auto_map", "base_model_type", "base_auto_map", "quantization_config")
    own = {key: value for key, value in packed.items() if key not in ours}
    if "base_auto_map" in packed:
        own["auto_map"] = packed["base_auto_map"]
    own["model_type"] = packed["base_model_type"]
    return own
