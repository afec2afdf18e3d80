"""How a model folder stores its weights, told from config.json, and what can load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

OWN = "compressor"
PLAIN = "plain"
NEEDS_DENSE = "vLLM, SGLang, llama.cpp, Ollama, TGI and whatever else expects dense weights"


@dataclass(frozen=True)
class Storage:
    """One way of storing weights.

    Attributes:
        method: ``plain``, ``compressor``, or the ``quant_method`` of config.json.
        bits: of a packed code, where config.json says so.
        loads, refuses: sentences on what can and what cannot load the folder.
    """

    method: str
    bits: int | None
    loads: tuple[str, ...]
    refuses: tuple[str, ...] = ()


KNOWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "compressed-tensors": (("transformers with the compressed-tensors package", "vLLM"), ("llama.cpp",)),
    "gptq": (("transformers with the gptqmodel package", "vLLM", "SGLang"), ("llama.cpp",)),
    "awq": (("transformers with the gptqmodel or autoawq package", "vLLM", "SGLang"), ("llama.cpp",)),
    "bitsandbytes": (("transformers with the bitsandbytes package", "vLLM"), ("llama.cpp",)),
    "fp8": (("transformers on an accelerator with fp8", "vLLM", "SGLang"), ()),
    "mxfp4": (("transformers on an accelerator with the kernels package", "vLLM"), ()),
    "hqq": (("transformers with the hqq package",), ("llama.cpp",)),
    "aqlm": (("transformers with the aqlm package", "vLLM"), ("llama.cpp",)),
    "mlx": (("mlx-lm",), ("transformers", "vLLM", "llama.cpp")),
    "torchao": (("transformers with the torchao package", "vLLM"), ("llama.cpp",)),
}


def storage_of(config: dict[str, Any], folder: Path) -> Storage:
    """Tell the way of storing from a folder's ``config.json``; unknown methods are named, not guessed at."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if config.get("model_type") == OWN:  # known by its type: our manifest names no quant_method
        if not isinstance(quantization, dict) or not isinstance(quantization.get("modules"), dict):
            return Storage(OWN, None, (), ("anything: model_type is 'compressor', but the manifest is missing",))
        return _own(config, folder)
    if not isinstance(quantization, dict):
        return Storage(PLAIN, None, _plain_loaders(config))
    method = str(quantization.get("quant_method") or ("mlx" if "quantization" in config else "unnamed"))
    loads, refuses = KNOWN.get(method, ((), ()))
    if not loads:
        refuses = (f"compressor does not know quant_method {method!r}: see the documentation of its maker",)
    return Storage(method, _bits(quantization), loads, refuses)


def _plain_loaders(config: dict[str, Any]) -> tuple[str, ...]:
    architecture = (config.get("architectures") or ["this architecture"])[0]
    return (
        "transformers: AutoModelForCausalLM.from_pretrained",
        f"any runtime of dense weights that knows {architecture}: vLLM, SGLang, llama.cpp (after conversion), ...",
    )


def _own(config: dict[str, Any], folder: Path) -> Storage:
    loads = ["transformers after 'import compressor': AutoModelForCausalLM.from_pretrained"]
    export = "" if config.get("linear_attention") else " (compressor export writes what they read)"
    refuses = ["transformers by itself, with neither of the two (it stops with an error)", NEEDS_DENSE + export]
    readers = {str(entry).split(".")[0] + ".py" for entry in (config.get("auto_map") or {}).values()}
    missing = sorted(reader for reader in readers if not (folder / reader).is_file())
    if not readers:
        refuses.insert(0, "transformers with trust_remote_code=True: config.json has no auto_map")
    elif missing:
        refuses.insert(0, f"transformers with trust_remote_code=True: {', '.join(missing)} is missing from the folder")
    else:
        loads.append(f"transformers with trust_remote_code=True, through {', '.join(sorted(readers))} in the folder")
    return Storage(OWN, None, tuple(loads), tuple(refuses))


def _bits(quantization: dict[str, Any]) -> int | None:
    """Bits of a code: ``bits``, ``w_bit``, bitsandbytes' flags, or those of the first group of compressed-tensors."""
    for key in ("bits", "w_bit", "nbits"):
        if isinstance(quantization.get(key), int):
            return int(quantization[key])
    if quantization.get("load_in_4bit") or quantization.get("quant_method") == "mxfp4":
        return 4
    if quantization.get("load_in_8bit") or quantization.get("quant_method") == "fp8":
        return 8
    for group in (quantization.get("config_groups") or {}).values():
        bits = ((group or {}).get("weights") or {}).get("num_bits") if isinstance(group, dict) else None
        if isinstance(bits, int):
            return bits
    return None
