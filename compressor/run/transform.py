"""One stage on one block: solve every linear, keep the representation for the next stage, record what happened."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from compressor.engine.forward import BlockRunner
from compressor.engine.observe import Observation
from compressor.engine.skeleton import Linear, Skeleton
from compressor.formats import Dense, LowRank, Masked, Representation, SparseInt, nbytes, pack
from compressor.methods.quadratic import layer_error
from compressor.methods.quantize_settings import QuantizeSettings
from compressor.methods.quantizers import quantize, quantize_factors
from compressor.methods.settings import PruneSettings
from compressor.methods.statistics import InputStatistics
from compressor.methods.table import FactorizationError, Pruned, solve
from compressor.run.recipe import Stage

# An expert that fewer tokens reached than this has no usable Hessian (share of the calibration tokens; and an
# absolute floor).
STARVED_SHARE = 0.005
STARVED_TOKENS = 32

# A dense matrix with at least this share of exact zeros was pruned: they stay zero.
PRUNED_SHARE = 0.05

# What a stage does where there are no statistics.
WITHOUT_DATA = {"prune": "pruned by magnitude", "quantize": "quantized by its weights alone"}


@dataclass
class BlockWork:
    """A block under transformation.

    Attributes:
        weights: linear name -> its current representation, values in the stored dtype, (out, in).
        originals: linear name -> dense weight of the source (out, in), stored dtype.
        layers: linear name -> what the report will say of it.
        folded: tensor name -> new value, stored dtype, of norms and biases into which scales were folded. Weights and
            originals of the linears that took part are fp32, and those of scaled inputs.
        narrow: tensor name -> what is written of it, stored dtype, where its shape has changed.
        unfolded: tensor name -> what it was, (out, in) for a linear, of everything that was changed by folding.
    """

    weights: dict[str, Representation] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    narrow: dict[str, Tensor] = field(default_factory=dict)
    unfolded: dict[str, Tensor] = field(default_factory=dict)


def open_block(skeleton: Skeleton, linears: list[Linear]) -> BlockWork:
    """Read the linears of a block in the form in which the source holds them."""
    work = BlockWork()
    for linear in linears:
        if linear.name in skeleton.packed:
            representation = skeleton.representation(linear.name)
        else:
            weight = skeleton.read(f"{linear.name}.weight")
            representation = Dense(weight.T.contiguous() if linear.transposed else weight)
        work.weights[linear.name] = representation
        work.originals[linear.name] = representation.dense()
        work.layers[linear.name] = _kept(linear, representation, packed=linear.name in skeleton.packed)
    return work


def _kept(linear: Linear, representation: Representation, *, packed: bool) -> dict[str, Any]:
    size = nbytes(representation.spec(linear.dtype))
    return {
        "name": linear.name,
        "block": linear.block,
        "kind": linear.kind,
        "shape": list(linear.shape),
        "method": "kept",
        "format": representation.spec(linear.dtype)["format"] if packed else str(linear.dtype).removeprefix("torch."),
        "sparsity": float((representation.dense() == 0).sum()) / (linear.shape[0] * linear.shape[1]) if packed else 0.0,
        "bits_per_weight": 8 * size / (linear.shape[0] * linear.shape[1]),
        "bytes": size,
    }


def apply_stage(
    stage: Stage,
    linears: list[Linear],
    work: BlockWork,
    seen: Observation | None,
    sparsity: float | None,
    runner: BlockRunner,
    total_tokens: int,
) -> None:
    """Solve ``linears`` with one stage, update ``work``, and put the new weights into the loaded block.

    Args:
        seen: statistics of the inputs, or ``None`` for a data-free stage.
        sparsity: of this block, where an allocation decided it.
        total_tokens: calibration tokens in all, against which starved experts are told.
    """
    for linear in linears:
        began = time.perf_counter()
        statistics, fallback = usable(linear, seen, total_tokens)
        before = work.weights[linear.name]
        weight = before.dense().to(runner.device, torch.float32)
        frozen = None if isinstance(before, LowRank) else _pruned_before(before, weight)
        after, notes, fallback = _solve(stage, linear, before, weight, statistics, fallback, sparsity, frozen)
        value = install(work, linear, after, runner)
        error = None
        if statistics is not None:
            original = work.originals[linear.name].to(runner.device, torch.float32)
            error = layer_error(original, value.to(runner.device, torch.float32), statistics.hessian)[1]
        rungs = list(statistics.rungs) if statistics is not None and fallback is None else []
        if seen is not None and seen.calls[linear.name] > 1:
            notes.append(f"called {seen.calls[linear.name]} times in one forward pass; all inputs were counted")
        if seen is not None and seen.bad_tokens[linear.name]:
            notes.append(f"{seen.bad_tokens[linear.name]} input rows with NaN or infinite values were left out")
        work.layers[linear.name] |= {
            "method": stage.name,
            "relative_error": error,
            "tokens": statistics.tokens if statistics is not None else (0 if fallback else None),
            "seconds": work.layers[linear.name].get("seconds", 0.0) + time.perf_counter() - began,
            "notes": work.layers[linear.name].get("notes", []) + notes,
            "rungs": rungs,
            "fallback": fallback,
        }


def install(work: BlockWork, linear: Linear, after: Representation, runner: BlockRunner) -> Tensor:
    """Give a linear its new representation, here, in the loaded block and in the report; return its value (m, n)."""
    work.weights[linear.name] = after
    value = after.dense(linear.dtype)
    runner.set_weight(f"{linear.name}.weight", value.T if linear.transposed else value)
    size = nbytes(after.spec(linear.dtype))
    work.layers[linear.name] |= {
        "format": after.spec(linear.dtype)["format"],
        "sparsity": float((value == 0).sum()) / value.numel(),
        "bits_per_weight": 8 * size / value.numel(),
        "bytes": size,
    }
    return value


def remark(work: BlockWork, linear: Linear, notes: Iterable[str]) -> None:
    """Add sentences to what the report will say of a linear."""
    work.layers[linear.name]["notes"] = [*work.layers[linear.name].get("notes", []), *notes]


def shift_bias(work: BlockWork, runner: BlockRunner, name: str, shift: Tensor) -> None:
    """Add ``shift`` (m,) to a bias, here and in the loaded block."""
    stored = work.folded[name] if name in work.folded else runner.skeleton.read(name)
    work.unfolded.setdefault(name, stored)
    work.folded[name] = (stored.float() + shift.cpu()).to(stored.dtype)
    runner.set_weight(name, work.folded[name])


def _pruned_before(representation: Representation, weight: Tensor) -> Tensor | None:
    """Positions (m, n) that an earlier stage or, in a plain checkpoint, an earlier tool has pruned."""
    if isinstance(representation, Masked):
        return ~representation.mask.to(weight.device)
    zeros = weight == 0
    return zeros if int(zeros.sum()) >= PRUNED_SHARE * zeros.numel() else None


def is_starved(name: str, tokens: int, total: int) -> bool:
    """Whether a linear is that of an expert which too few of all calibration tokens have reached."""
    return ".experts." in name and tokens < max(STARVED_TOKENS, STARVED_SHARE * total)


def usable(linear: Linear, seen: Observation | None, total: int) -> tuple[InputStatistics | None, str | None]:
    """The statistics of a linear's input, taken out of ``seen``, or why they are of no use."""
    if seen is None:
        return None, None
    statistics = seen.statistics.pop(linear.name)  # the last user lets go of Hessian and factor
    if is_starved(linear.name, statistics.tokens, total):
        return None, f"only {statistics.tokens} of {total} calibration tokens reached this expert"
    if statistics.tokens == 0:
        return None, "no calibration token reached this layer"
    return statistics, None


def _solve(
    stage: Stage,
    linear: Linear,
    before: Representation,
    weight: Tensor,
    statistics: InputStatistics | None,
    fallback: str | None,
    sparsity: float | None,
    frozen: Tensor | None,
) -> tuple[Representation, list[str], str | None]:
    """The new representation, notes, and what was done instead of what was asked, with the reason."""
    settings = stage.settings_of(linear.name)

    def attempt(stats: InputStatistics | None) -> tuple[Representation, list[str]]:
        if isinstance(settings, PruneSettings):
            pruned = solve(stage.name, weight, stats, settings, sparsity, frozen)
            return _masked(pruned, settings, linear.dtype), list(pruned.notes)
        if isinstance(before, LowRank):
            return quantize_factors(stage.name, before, stats, as_quantize(settings)), []
        quantized = quantize(stage.name, weight, stats, as_quantize(settings), frozen)
        return quantized.code, list(quantized.notes)

    instead = WITHOUT_DATA[stage.kind]
    try:
        after, notes = attempt(statistics)
    except FactorizationError as error:
        if statistics is None:
            raise
        after, notes = attempt(None)
        fallback = str(error)
    return after, notes, fallback and f"{fallback}: {instead}"


def as_quantize(settings: BaseModel) -> QuantizeSettings:
    """The settings, known to be those of a quantizing method."""
    assert isinstance(settings, QuantizeSettings)
    return settings


def _masked(pruned: Pruned, settings: PruneSettings, dtype: torch.dtype) -> Representation:
    mask = pruned.mask.cpu()
    if pruned.codes is not None:
        grid = pruned.codes
        return SparseInt(grid.codes.cpu(), grid.scale.to(torch.float16).cpu(), grid.zero.cpu(), mask, grid.bits)
    return Masked(pruned.weight.to(dtype).cpu(), mask, settings.group)


def pack_block(
    work: BlockWork, linears: list[Linear]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """Store every linear that is more than a dense matrix: manifest entries, and parts, by linear name."""
    specs: dict[str, dict[str, Any]] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for linear in linears:
        representation = work.weights[linear.name]
        if not isinstance(representation, Dense):
            specs[linear.name], parts[linear.name] = pack(representation, linear.dtype)
    return specs, parts
