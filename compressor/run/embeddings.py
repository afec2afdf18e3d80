"""``--embeddings BITS``: the input embedding and the output head as integers in groups, rounded to nearest.

What goes through the compressed model starts at the coded embedding, and is judged behind the coded head; the untouched
model keeps its own. Tied to each other, both are one matrix, which is coded once.
"""

from __future__ import annotations

from typing import Any

import torch

from compressor.engine.forward import BlockRunner
from compressor.engine.skeleton import Skeleton
from compressor.formats import GroupInt
from compressor.formats.parts import dtype_name
from compressor.methods import round_nearest
from compressor.methods.quantize_settings import QuantizeSettings, RtnSettings
from compressor.run.recipe import Recipe

GROUP = 128


def embedding_modules(skeleton: Skeleton) -> list[str]:
    """Module paths of the input embedding and the output head, as far as they are stored; one of them when tied."""
    model = skeleton.model
    wanted = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module}
    names = [name for name, module in model.named_modules() if id(module) in wanted]
    return [name for name in names if f"{name}.weight" in skeleton.origins]


def asked_bits(recipe: Recipe) -> int | None:
    """Bits that a stage asks for, or None: embeddings are left alone."""
    asked = [stage.settings.embeddings for stage in recipe.stages if isinstance(stage.settings, QuantizeSettings)]
    return next((bits for bits in asked if bits), None)


def foreseen_specs(skeleton: Skeleton, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Module path -> manifest entry of the embeddings that the recipe wants coded."""
    bits = asked_bits(recipe)
    specs = {}
    for name in embedding_modules(skeleton) if bits else []:
        dtype, (m, n) = skeleton.stored(f"{name}.weight")
        specs[name] = round_nearest.foresee(_settings(bits), (m, n), dtype_name(dtype))
    return specs


def embedding_violations(skeleton: Skeleton, recipe: Recipe) -> list[str]:
    """What stands against coding the embeddings."""
    packed = [name for name in embedding_modules(skeleton) if name in skeleton.packed]
    if not asked_bits(recipe) or not packed:
        return []
    return [f"{packed[0]} is already quantized ({skeleton.packed[packed[0]]['format']}); leave --embeddings out"]


def code_embeddings(skeleton: Skeleton, recipe: Recipe) -> dict[str, GroupInt]:
    """Module path -> code, made from the weights alone."""
    bits = asked_bits(recipe)
    codes = {}
    for name in embedding_modules(skeleton) if bits else []:
        code = round_nearest.solve(skeleton.read(f"{name}.weight").float(), None, _settings(bits)).code
        assert isinstance(code, GroupInt)
        codes[name] = code
    return codes


def coded_runner(runner: BlockRunner, codes: dict[str, GroupInt]) -> BlockRunner:
    """A runner whose outer model has the coded embeddings; ``runner`` itself when there are none."""
    if not codes:
        return runner
    values = {f"{name}.weight": code.dense(_stored(runner.skeleton, name)) for name, code in codes.items()}
    return runner.with_outer(values)


def _stored(skeleton: Skeleton, module: str) -> torch.dtype:
    return skeleton.stored(f"{module}.weight")[0]


def _settings(bits: int | None) -> RtnSettings:
    return RtnSettings(bits=bits or 8, group=GROUP)
