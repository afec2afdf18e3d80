"""A decomposing stage on one block: matrix after matrix replaced by a product, in the order in which they are used."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compressor.engine.forward import Stream
from compressor.engine.observe import Observation, observe
from compressor.engine.skeleton import Linear
from compressor.methods.decompose_settings import SvdLlmSettings
from compressor.methods.decomposers import decompose, with_residual
from compressor.methods.factors import split_product
from compressor.methods.quadratic import layer_error
from compressor.methods.statistics import FactorizationError, InputStatistics
from compressor.run.finish import expert_tokens
from compressor.run.rank_survey import as_held, cost_of
from compressor.run.ranks import rank_note, settings_of, welore_class
from compressor.run.recipe import Stage
from compressor.run.session import Run
from compressor.run.transform import BlockWork, install, remark, shift_bias, usable
from compressor.run.units import unit_of, units_in

WITHOUT_DATA = "decomposed by its weights alone"


def decompose_block(run: Run, number: int, block: int, linears: list[Linear], work: BlockWork) -> list[dict[str, Any]]:
    """Decompose ``linears`` of a loaded block by stage ``number``, and send its reference stream through the block.

    Returns:
        Calibration tokens that reached each expert.
    """
    stage = run.stages[number]
    stream, reference = run.streams.get(f"stage {number}"), run.streams.get(f"stage {number} before")
    before = {
        f"{linear.name}.weight": as_held(run, linear, work.weights[linear.name].dense()) for linear in linears
    } | {name: run.runner.loaded(name) for name in biases(run, linears)}
    experts: list[dict[str, Any]] = []
    if stream is None:
        _settle(run, number, linears, work, None, 0)
    else:
        for members in steps(run, stage, block, linears, stream):
            seen = behind = None
            ranks = run.ranks[number]
            if any(ranks[unit_of(x, ranks)] is not None or ".experts." in x.name for x in members):
                seen = _observed(run, stage, block, members, stream, reference, before)
                experts += expert_tokens(members, seen)
                behind = _behind(run, stage, block, members, stream)
            _settle(run, number, members, work, seen, stream.ids.numel(), behind)
    if reference is not None:
        with torch.no_grad():
            for batch, span in reference.batches():
                reference.states[span] = run.runner.forward_with(block, reference, batch, span, before).cpu()
    return experts


def steps(run: Run, stage: Stage, block: int, linears: list[Linear], stream: Stream) -> list[list[Linear]]:
    """Groups of linears that are settled together: those with the same input, in the order of use; or all at once."""
    settings = stage.settings
    if not isinstance(settings, SvdLlmSettings) or not settings.in_order or settings.residual:
        return [linears]
    size = stream.batch
    one = Stream(stream.ids[:size], stream.states[:size], stream.calls[:1], size)
    seen = observe(run.runner, block, linears, one)
    leader: dict[int, str] = {}
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        kind = leader.setdefault(id(seen.statistics[linear.name]), linear.kind)
        same = next((other for other, members in groups.items() if any(m.kind == linear.kind for m in members)), kind)
        groups.setdefault(same, []).append(linear)
    return list(groups.values())


def biases(run: Run, linears: Sequence[Linear]) -> list[str]:
    """Names of the biases that the source holds for these linears."""
    return [name for linear in linears if (name := f"{linear.name}.bias") in run.skeleton.origins]


def _observed(
    run: Run,
    stage: Stage,
    block: int,
    linears: list[Linear],
    stream: Stream,
    reference: Stream | None,
    before: dict[str, Tensor],
) -> Observation:
    """Statistics of the inputs, of what is compressed already, of the untouched model, or a mixture."""
    settings = stage.settings
    share = settings.dense_share if isinstance(settings, SvdLlmSettings) else 0.0
    drifted = isinstance(settings, SvdLlmSettings) and settings.drift > 0
    runner = run.runner
    if share and reference is not None:
        dense = observe(runner, block, linears, reference, weights=before, moments=True)
        if share == 1:
            return dense
    seen = observe(runner, block, linears, stream, reference if drifted else None, untouched=before, moments=True)
    if share and reference is not None:
        mixed = {id(statistics): statistics for statistics in seen.statistics.values()}
        partner = {id(seen.statistics[name]): dense.statistics[name] for name in seen.statistics}
        for key, statistics in mixed.items():
            _mix(statistics, partner[key], share)
    return seen


def _behind(run: Run, stage: Stage, block: int, linears: list[Linear], stream: Stream) -> Observation | None:
    """Statistics of the inputs behind what is already decomposed, where a factor is to be fitted to them afterwards."""
    settings = stage.settings
    wanted = isinstance(settings, SvdLlmSettings) and settings.refit
    return observe(run.runner, block, linears, stream) if wanted else None


def _mix(here: InputStatistics, dense: InputStatistics, share: float) -> None:
    """Make ``here`` the mean of both, in place; ``share`` is that of ``dense``."""
    for field in ("hessian", "total", "absolute"):
        mine, other = getattr(here, field), getattr(dense, field)
        if mine is not None and other is not None:
            setattr(here, field, torch.lerp(mine, other, share))


def _settle(
    run: Run,
    number: int,
    linears: Sequence[Linear],
    work: BlockWork,
    seen: Observation | None,
    tokens: int,
    behind: Observation | None = None,
) -> None:
    """Decompose matrices with what was seen of their inputs; put them into ``work`` and into the loaded block."""
    stage, ranks = run.stages[number], run.ranks[number]
    for unit in units_in(ranks, linears):
        began, rank = time.perf_counter(), ranks[unit.name]
        found = [usable(linear, seen, tokens) for linear in unit.members]
        statistics, fallback = found[0]
        for linear in unit.members:
            component = welore_class(stage, rank)
            remark(work, linear, [rank_note(unit, rank) + (f" ({component})" if component else "")])
            work.layers[linear.name]["component"] = component
        if rank is None:
            continue
        weights = [work.weights[linear.name].dense().to(run.runner.device, torch.float32) for linear in unit.members]
        settings = settings_of(stage, unit.members[0])
        cost = cost_of(run, number, unit) if statistics is not None else None
        cost = None if cost is None else cost.to(run.runner.device)
        has_bias = all(f"{linear.name}.bias" in run.skeleton.origins for linear in unit.members)
        weight = torch.cat(weights)
        try:
            again = None if behind is None or statistics is None else behind.statistics[unit.members[0].name]
            made = decompose(weight, statistics, settings, rank, cost, has_bias=has_bias, behind=again)
        except FactorizationError as failure:
            made, statistics, fallback = decompose(weight, None, settings, rank), None, str(failure)
        codes = [made.code] if len(unit.members) == 1 else split_product(made.code, [x.shape[0] for x in unit.members])
        for i, (linear, own) in enumerate(zip(unit.members, weights, strict=True)):
            product = replace(codes[i], shared=unit.members[0].name) if i else codes[i]
            code = with_residual(own, product, linear.dtype) if settings.residual else product
            value = install(work, linear, code, run.runner).to(run.runner.device, torch.float32)
            error = None if statistics is None else layer_error(own, value, statistics.hessian)[1]
            remark(work, linear, made.notes)
            work.layers[linear.name] |= {
                "method": stage.name,
                "relative_error": error,
                "tokens": statistics.tokens if statistics is not None else (0 if fallback else None),
                "seconds": work.layers[linear.name].get("seconds", 0.0) + time.perf_counter() - began,
                "rungs": list(statistics.rungs) if statistics is not None else [],
                "fallback": fallback and f"{fallback}: {WITHOUT_DATA}",
            }
        if made.bias is not None:
            for linear, shift in zip(unit.members, unit.split(made.bias), strict=True):
                shift_bias(work, run.runner, f"{linear.name}.bias", shift)
