"""Names of tensors: what a checkpoint calls what the transformers model calls otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable

_SPARSE_MOE = (
    (r"\.mlp\.gate\.", ".block_sparse_moe.gate."),
    (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
    (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
    (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
)

# Family -> (module name, checkpoint name), where they differ by more than the base-model prefix.
RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": _SPARSE_MOE,
    "minimax": _SPARSE_MOE,
    "minimax_m2": _SPARSE_MOE,
    "gpt_neox": ((r"^lm_head\.", "embed_out."),),
}


def plain_name(name: str, family: str) -> str:
    """The name of a module tensor in a plain checkpoint of a model family (``model_type``)."""
    for pattern, replacement in RENAMED.get(family, ()):
        name = re.sub(pattern, replacement, name)
    return name


def candidates(name: str, prefix: str) -> list[str]:
    """Names under which a checkpoint may hold a module tensor: other words, with and without the base-model prefix."""
    names = list(dict.fromkeys([name, *(plain_name(name, family) for family in RENAMED)]))
    if prefix:
        bare = [n[len(prefix) + 1 :] for n in names if n.startswith(prefix + ".")]
        names += bare + [f"{prefix}.{n}" for n in names]
    return names


def fused_origin(name: str) -> tuple[str, Callable[[tuple[int, ...]], tuple[int | slice, ...]]] | None:
    """Origin of an expert's matrix inside fused 3-D tensors: gate_up_proj (E, 2I, H) and down_proj (E, H, I)."""
    match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight", name)
    if not match:
        return None
    path, expert, part = match[1], int(match[2]), match[3]
    if part == "down_proj":
        return f"{path}.down_proj", lambda shape: (expert,)
    first = part == "gate_proj"
    return (
        f"{path}.gate_up_proj",
        lambda shape: (expert, slice(0, shape[1] // 2) if first else slice(shape[1] // 2, shape[1])),
    )
