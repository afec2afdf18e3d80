"""What GGUF must know of a model beside its tensors: hyper-parameters, names, and the order of rotated rows.

llama.cpp computes an architecture as it knows it and ignores what it does not: whatever is beyond that is refused here.
Source of the keys and of the order of rows: llama.cpp's converter, docs of the GGUF format.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.engine.skeleton import Skeleton
from compressor.errors import UserError
from compressor.hf.linearized import linear_layers

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Model type of transformers -> architecture of llama.cpp."""

ROTATED_IN_PAIRS = frozenset({"llama"})
"""Architectures of llama.cpp that rotate neighbouring rows of a head, where transformers rotates its halves."""

BIASES = {"qwen2": re.compile(r"self_attn\.[qkv]_proj\.bias$")}
"""Model type -> the biases it has as its checkpoints come; no other may have any."""

ROPE = {"default": None, "linear": "linear", "llama3": None}
"""Kinds of rotation -> GGUF's word for it; llama3 is a tensor of factors."""

OTHERWISE = "--format dense unpacks every model, for converters of other programs"


def architecture(skeleton: Skeleton) -> str:
    """llama.cpp's name of the architecture of a model.

    Raises:
        UserError: it has another one, or something in it that llama.cpp would not compute.
    """
    config = skeleton.config
    kind = str(config.model_type)
    if linear_layers(skeleton.checkpoint.config):
        raise _refused("its attention was linearized, which llama.cpp does not compute")
    if kind not in ARCHITECTURES:
        raise _refused(f"its architecture is {kind}; gguf is written for {', '.join(ARCHITECTURES)}")
    if config.hidden_act != "silu":
        raise _refused(f"its activation is {config.hidden_act}, llama.cpp computes silu there")
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is not None and sliding and window < config.max_position_embeddings:
        raise _refused(f"its attention slides over {window} tokens, which llama.cpp does not do for {kind}")
    rope = rotation(config)
    if rope["rope_type"] not in ROPE:
        raise _refused(f"its positions are scaled by {rope['rope_type']!r}; gguf is written for {', '.join(ROPE)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused("it rotates a part of each head only")
    _check_tensors(skeleton, kind)
    return ARCHITECTURES[kind]


def _refused(why: str) -> UserError:
    return UserError(f"this model cannot be written as gguf: {why}", fix=OTHERWISE)


def _check_tensors(skeleton: Skeleton, kind: str) -> None:
    """Every tensor has the shape that the hyper-parameters give it, and no bias is there that the family lacks."""
    config = skeleton.config
    wanted = {
        "q_proj.weight": (config.num_attention_heads * head_size(config), config.hidden_size),
        "k_proj.weight": (config.num_key_value_heads * head_size(config), config.hidden_size),
        "v_proj.weight": (config.num_key_value_heads * head_size(config), config.hidden_size),
        "o_proj.weight": (config.hidden_size, config.num_attention_heads * head_size(config)),
        "up_proj.weight": (config.intermediate_size, config.hidden_size),
        "gate_proj.weight": (config.intermediate_size, config.hidden_size),
        "down_proj.weight": (config.hidden_size, config.intermediate_size),
    }
    expected = BIASES.get(kind)
    for name in skeleton.origins:
        shape = skeleton.stored(name)[1]
        leaf = name.rpartition(".")[0].rpartition(".")[2] + ".weight"
        if name.endswith(".bias") and not (expected and expected.search(name)):
            raise _refused(f"{name} is a bias that {kind} does not have as a rule")
        if name.endswith(".weight") and leaf in wanted and shape != wanted[leaf]:
            raise _refused(f"{name} is {list(shape)}, where its hyper-parameters say {list(wanted[leaf])}")


def head_size(config: Any) -> int:
    """Numbers in a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotation(config: Any) -> dict[str, Any]:
    """How positions are rotated: ``rope_type``, ``rope_theta`` and what else belongs to it."""
    return {"rope_type": "default", "rope_theta": 10000.0, **(getattr(config, "rope_parameters", None) or {})}


def write_hyperparameters(writer: Any, config: Any) -> None:
    """Add the keys that llama.cpp needs to a ``GGUFWriter``."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size(config))
    writer.add_vocab_size(config.vocab_size)
    rope = rotation(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if ROPE[rope["rope_type"]] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_factors(config: Any) -> NDArray[np.float32] | None:
    """What divides the frequencies, (head / 2,) fp32, of a model whose rotation is of kind llama3; else ``None``."""
    rope = rotation(config)
    if rope["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, attention = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    if attention != 1.0:
        raise _refused("its positions scale attention")
    size = head_size(config)
    plain = 1.0 / float(rope["rope_theta"]) ** (np.arange(0, size, 2, dtype=np.float64) / size)
    factors: NDArray[np.float32] = (plain / scaled.double().numpy()).astype(np.float32)
    return factors


def tensor_names(skeleton: Skeleton, arch: str) -> dict[str, str]:
    """Module tensor -> name in GGUF, in the order in which they are written.

    Raises:
        UserError: names a tensor that llama.cpp has no name for.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(key for key in MODEL_ARCH if MODEL_ARCH_NAMES[key] == arch)
    known = get_tensor_name_map(number, skeleton.config.num_hidden_layers)
    names = {}
    for name in skeleton.origins:
        found = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _refused(f"llama.cpp has no name for the tensor {name!r}")
        names[name] = str(found)
    return names


def row_order(name: str, config: Any, arch: str) -> NDArray[np.intp] | None:
    """Which row of a module tensor stands at each place in GGUF; ``None``: as they are.

    Queries and keys of `ROTATED_IN_PAIRS`: row i of a head's first half is followed by row i of its second half.
    """
    found = re.search(r"\.([qk])_proj\.(weight|bias)$", name)
    if arch not in ROTATED_IN_PAIRS or not found:
        return None
    heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
    size = head_size(config)
    return np.arange(heads * size).reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)
