"""Converted models that stock transformers loads: which class, which config.json, which tensors, which layer to train.

No file is touched here, and one block at a time is enough:

1. ``check(config, method)`` refuses, from config.json alone, what cannot be carried; ``check_norms`` from the norms,
   which are small.
2. ``student_layer`` makes the stock module that replaces a layer's attention, to be trained on what the attention sees.
3. ``native_config``, ``native_outer`` and, for each block, ``native_block`` give what is to be written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compressor.errors import UserError, nearest
from compressor.hf import native_granite, native_qwen
from compressor.hf.native_source import head_dim, source_config


@dataclass(frozen=True)
class _Target:
    families: tuple[str, ...]
    refusals: Callable[[Any], list[str]]
    config: Callable[[Any, Sequence[int]], dict[str, Any]]
    block: Callable[[Mapping[str, Tensor], Mapping[str, Tensor] | None], dict[str, Tensor]]
    outer: Callable[[Mapping[str, Tensor], bool], dict[str, Tensor]]
    student: Callable[[Any, int, nn.Module], nn.Module]
    mixer: str
    layer: str
    hold: Callable[[nn.Module], None]


_TARGETS = {
    "mamba2": _Target(
        native_granite.FAMILIES,
        native_granite.refusals,
        native_granite.native_config,
        native_granite.native_block,
        native_granite.native_outer,
        native_granite.student_layer,
        native_granite.MIXER,
        "Mamba-2",
        native_granite.hold,
    ),
    "gdn": _Target(
        native_qwen.FAMILIES,
        native_qwen.refusals,
        native_qwen.native_config,
        native_qwen.native_block,
        native_qwen.native_outer,
        native_qwen.student_layer,
        native_qwen.MIXER,
        "gated delta net",
        lambda layer: None,
    ),
}
_NORMS = {True: "each head alone (transformers 5.23 and later)", False: "all heads together (transformers before 5.23)"}
METHODS = tuple(_TARGETS)
"""``mamba2`` for Llama, Mistral and Qwen2 in ``granitemoehybrid``; ``gdn`` for Qwen3 in ``qwen3_5_text``."""

GATES = ("A_log", "dt_bias")
"""Tensors of a converted layer that say how fast it forgets: they want smaller steps than matrices do."""


def _target(method: str) -> _Target:
    if method not in _TARGETS:
        raise UserError(f"there is no native method {method!r}{nearest(method, METHODS)}")
    return _TARGETS[method]


def refusals(config: Mapping[str, Any], method: str) -> list[str]:
    """Return why a model cannot be exported by a method, each reason naming what is in the way; empty when it can.

    Args:
        config: its config.json.

    Raises:
        UserError: there is no such method.
    """
    target, family = _target(method), config.get("model_type")
    if family not in target.families:
        other = next((name for name in METHODS if family in _TARGETS[name].families), None)
        hint = f"; {other} does" if other else ""
        return [f"{method} takes {', '.join(target.families)} models, not {family}{hint}"]
    return target.refusals(source_config(config))


def check(config: Mapping[str, Any], method: str) -> None:
    """Refuse a model that cannot be exported by a method.

    Raises:
        UserError: names every reason.
    """
    reasons = refusals(config, method)
    if reasons:
        raise UserError(f"this model has no exact counterpart in stock transformers: {'; '.join(reasons)}")


def check_norms(config: Mapping[str, Any], method: str, norms: Mapping[str, Tensor]) -> None:
    """Refuse norm weights that the target's notation would damage. To be called before any training.

    Args:
        config: the source's config.json.
        norms: module tensor name -> weight, of all norms of the model (or more), in the dtype of the checkpoint.

    Raises:
        UserError: names the first, and says how many more there are.
    """
    if method != "gdn":
        return
    reasons = native_qwen.norm_refusals(norms, bool(source_config(config).tie_word_embeddings))
    if reasons:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise UserError(f"{reasons[0]}{more}", fix="use a checkpoint in fp32")


def native_config(config: Mapping[str, Any], method: str, converted: Sequence[int]) -> dict[str, Any]:
    """Return the config.json of the exported model.

    Args:
        config: the source's config.json.
        converted: numbers of the layers that are replaced; none makes a copy with the very same logits.

    Raises:
        UserError: see :func:`check`; or there is no layer of softmax attention left.
    """
    check(config, method)
    return _target(method).config(source_config(config), converted)


def native_block(
    method: str, tensors: Mapping[str, Tensor], student: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of one decoder block of the exported model, by name within the block.

    Args:
        tensors: the source's block, by name within it, in the dtype of the checkpoint.
        student: ``state_dict()`` of the layer that replaces the attention; None keeps it.

    Raises:
        UserError: a tensor has no place in the target.
    """
    return _target(method).block(tensors, student)


def native_outer(method: str, tensors: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """Return the tensors outside the blocks, by full name (``model.embed_tokens.weight``).

    Raises:
        UserError: the last norm cannot be carried.
    """
    return _target(method).outer(tensors, tied)


def student_layer(config: Mapping[str, Any], method: str, layer: int, attention: nn.Module) -> nn.Module:
    """Build the stock module that replaces a layer's attention, started from its weights.

    Args:
        config: the source's config.json.
        layer: number of the layer.
        attention: the loaded ``self_attn``.

    Returns:
        fp32; ``student(hidden_states)`` maps what the attention is given, (B, T, D), to (B, T, D) in its place,
        differentiable in plain PyTorch on any device.
    """
    return _target(method).student(source_config(config), layer, attention)


def mixer_name(method: str) -> str:
    """What the exported model calls a converted layer, within a decoder block."""
    return _target(method).mixer


def content(config: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Say in plain data what a converted layer is, for a report."""
    source, target = source_config(config), _target(method)
    model = target.config(source, [])["architectures"][0]
    found = {"layer": target.layer, "model": model, "heads": source.num_attention_heads, "state": head_dim(source)}
    return found if method != "mamba2" else {**found, "norm": _NORMS[native_granite.norms_each_head()]}


def caveats(method: str) -> list[str]:
    """Return what a user should know of the installed transformers before a model is made for it."""
    if method != "mamba2" or native_granite.norms_each_head():
        return []
    return [
        "this transformers norms all heads of a Mamba-2 layer together, 5.23 and later norm each alone: the result is "
        "right with versions before 5.23 only, and others load it without a word; pip install -U transformers first"
    ]


def hold(method: str, layer: nn.Module) -> None:
    """Prepare a converted layer that was loaded for further training: what must stay as it is gets no gradient."""
    _target(method).hold(layer)
