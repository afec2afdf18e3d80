"""Making a model narrower inside its modules: which widths, what is stored, what stands in config.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from compressor.engine.skeleton import Skeleton
from compressor.errors import UserError
from compressor.hf.narrow import MlpNames, check_values, kv_bytes_per_token, mlp_names, narrow_config, value_dim
from compressor.hf.reader import source_config
from compressor.methods.decompose_settings import TransactSettings
from compressor.run.recipe import Stage

VALUES, OUTPUT = "self_attn.v_proj", "self_attn.o_proj"


@dataclass(frozen=True)
class Narrowing:
    """What a narrowed model looks like.

    Attributes:
        names: how its MLPs are put together.
        neurons, neurons_before: of an MLP.
        dims, dims_before: of an attention value.
        shapes: tensor name -> its shape in the output, where that differs from the source.
        config: the content of config.json.
        cache, cache_before: bytes that a token adds to the cache of keys and values.
    """

    names: MlpNames
    neurons: int
    neurons_before: int
    dims: int
    dims_before: int
    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    cache: int
    cache_before: int


def foresee_narrow(stages: Iterable[Stage], skeleton: Skeleton) -> Narrowing | None:
    """The shapes that a recipe leads to; None when it keeps them.

    Raises:
        UserError: an architecture that no stock class says narrower, a packed source, or nothing that would be left.
    """
    settings = next((stage.settings for stage in stages if isinstance(stage.settings, TransactSettings)), None)
    if settings is None:
        return None
    if skeleton.packed:
        raise UserError("the source is packed, and narrowing needs plain weights", fix="start from its source")
    config = skeleton.config
    names = mlp_names(config)
    neurons, dims = getattr(config, names.field), value_dim(config)
    if settings.values < 1:
        check_values(config)
    kept_dims = max(1, round(settings.values * dims))
    kept = _neurons(settings, names, skeleton, neurons, kept_dims / dims)
    new = narrow_config(
        source_config(skeleton.checkpoint.config),
        config,
        mlp=[kept] * len(skeleton.block_names),
        values=[kept_dims] * len(skeleton.block_names) if kept_dims < dims else None,
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for block in skeleton.block_names:
        shapes |= _mlp_shapes(skeleton, block, names, kept)
        if kept_dims < dims:
            shapes |= _value_shapes(skeleton, block, kept_dims, dims)
    dtype, lost = skeleton.linears[0].dtype, (dims - kept_dims) * len(skeleton.block_names)
    cache = kv_bytes_per_token(config, dtype)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    after = cache - lost * heads * dtype.itemsize
    return Narrowing(names, kept, neurons, kept_dims, dims, shapes, new, after, cache)


def _neurons(settings: TransactSettings, names: MlpNames, skeleton: Skeleton, neurons: int, values: float) -> int:
    """How many neurons an MLP keeps."""
    if settings.mlp is not None:
        wanted = settings.mlp * neurons
    else:
        size = {x.kind: x.shape[0] * x.shape[1] for x in skeleton.linears if x.block == 0}
        mlp = sum(size[name] for name in (*names.into, names.out))
        attention = size.get(VALUES, 0) + size.get(OUTPUT, 0)
        assert settings.keep_params is not None  # one of the two is given
        wanted = neurons * (settings.keep_params * (mlp + attention) - values * attention) / mlp
    kept = min(neurons, int(wanted + 1e-9) // settings.multiple * settings.multiple)
    if kept < 1:
        raise UserError(f"{settings.budget} leaves no neuron in an MLP of {neurons}", fix="a larger --keep-params")
    return kept


def _mlp_shapes(skeleton: Skeleton, block: str, names: MlpNames, kept: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name in names.into:
        for leaf in ("weight", "bias"):
            if (tensor := f"{block}.{name}.{leaf}") in skeleton.origins:
                found[tensor] = (names.stacked * kept, *skeleton.stored(tensor)[1][1:])
    out = f"{block}.{names.out}.weight"
    return found | {out: (skeleton.stored(out)[1][0], kept)}


def _value_shapes(skeleton: Skeleton, block: str, kept: int, dims: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for leaf in ("weight", "bias"):
        if (tensor := f"{block}.{VALUES}.{leaf}") in skeleton.origins:
            rows, *rest = skeleton.stored(tensor)[1]
            found[tensor] = (rows // dims * kept, *rest)
    rows, columns = skeleton.stored(f"{block}.{OUTPUT}.weight")[1]
    return found | {f"{block}.{OUTPUT}.weight": (rows, columns // dims * kept)}
