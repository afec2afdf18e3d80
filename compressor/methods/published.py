"""Methods by the names under which they are known elsewhere: the hint that a mistyped or foreign method name gets.

The settings tables say what there is; this one only adds names. `Known.flags` are checked against the settings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """What stands for a published method here.

    Attributes:
        kind: the verb.
        flags: what to give it after ``--method``: a method, and flags.
        same: whether it is that method; else the nearest to it that there is.
    """

    kind: str
    flags: str
    same: bool = True


def _near(kind: str, flags: str) -> Known:
    return Known(kind, flags, same=False)


PUBLISHED: dict[str, Known] = {
    # pruning
    "ALPS": Known("prune", "admm"),
    "OWL": Known("prune", "sparsegpt --allocation owl"),
    "DSnoT": _near("prune", "wanda --refit"),
    "RIA": _near("prune", "wanda"),
    "LLM-Pruner": _near("decompose", "transact"),
    "FLAP": _near("decompose", "transact"),
    "SliceGPT": _near("decompose", "transact"),
    # quantization
    "round-to-nearest": Known("quantize", "rtn"),
    "OPTQ": Known("quantize", "gptq"),
    "GPTAQ": Known("quantize", "gptq --drift 0.25"),
    "PTQTP": Known("quantize", "trit-planes --fit paper"),
    "PT2-LLM": _near("quantize", "trit-planes --planes 1"),
    "BitNet": _near("quantize", "trit-planes --planes 1"),
    "BitNet b1.58": _near("quantize", "trit-planes --planes 1"),
    "TWN": _near("quantize", "trit-planes --planes 1"),
    "ternary": _near("quantize", "trit-planes --planes 1"),
    "GPTQ-PB": Known("quantize", "pb-llm --fit paper"),
    "BiLLM": _near("quantize", "pb-llm"),
    "ARB-LLM": _near("quantize", "pb-llm"),
    "STBLLM": _near("quantize", "pb-llm"),
    "LQ-LoRA": _near("quantize", "gptq --correct 16"),
    "CALDERA": _near("quantize", "gptq --correct 16 --correct-bits 4"),
    "LoftQ": _near("quantize", "gptq --correct 16"),
    "LQER": _near("quantize", "gptq --correct 16"),
    "AdaRound": _near("quantize", "gptq --tune-steps 200"),
    "AutoRound": _near("quantize", "gptq --tune-steps 200"),
    "SignRound": _near("quantize", "gptq --tune-steps 200"),
    "BRECQ": _near("quantize", "gptq --tune-steps 200"),
    "OmniQuant": _near("quantize", "awq --tune-steps 200"),
    "SmoothQuant": _near("quantize", "awq"),
    "HQQ": _near("quantize", "rtn"),
    # low rank
    "FWSVD": _near("decompose", "svd-llm"),
    "Dobi-SVD": Known("decompose", "dobi"),
    "PiSSA": Known("decompose", "svd --residual"),
    "MiLoRA": _near("decompose", "corda --components smallest"),
    # linear attention
    "StreamingLLM": Known("linearize", "window-sink"),
    "Hedgehog": _near("linearize", "lolcats"),
    "T2R": _near("linearize", "supra"),
    "Gated Linear Attention": _near("linearize", "liger"),
    "GLA": _near("linearize", "liger"),
    "Lightning Attention": Known("linearize", "lightning"),
    "HALO": _near("linearize", "lightning"),
    "HypeNet": _near("linearize", "lightning"),
    "Mamba": _near("linearize", "mamba2"),
    "MambaInLlama": _near("linearize", "mamba2"),
    "MOHAWK": _near("linearize", "mamba2"),
    "Gated DeltaNet": Known("linearize", "gdn"),
    "DeltaNet": _near("linearize", "gdn"),
}
"""Name as published -> what it is here, or what is nearest to it."""


def plain_name(name: str) -> str:
    """A name without case, spaces and punctuation: ``PB_LLM``, ``pb-llm`` and ``PBLLM`` are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def known_as(name: str, kind: str, methods: dict[str, list[str]]) -> str:
    """Return ``" (...)"`` with what to type for a method of that name; empty where no such name is known.

    Args:
        kind: the verb to which it was given.
        methods: verb -> names of its methods.
    """
    wanted = plain_name(name)
    if not wanted:
        return ""
    for verb in (kind, *(other for other in methods if other != kind)):
        if (own := next((method for method in methods[verb] if plain_name(method) == wanted), None)) is not None:
            return f" (did you mean {own!r}?)" if verb == kind else f" (a method of {verb}: {_typed(verb, own)})"
    found = next((known for published, known in PUBLISHED.items() if plain_name(published) == wanted), None)
    if found is None:
        return ""
    words = "here it is" if found.same else "not here; nearest to it is"
    return f" ({words} {_typed(found.kind, found.flags)})"


def _typed(verb: str, flags: str) -> str:
    return f"compressor {verb} MODEL --method {flags}"
