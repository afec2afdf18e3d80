"""Before the first matrix is decomposed: what every component of every matrix is worth at the loss of the whole model.

The curvature of the loss with respect to a linear's weight is taken to be a product, F for its outputs and H for its
inputs (K-FAC, arXiv 1503.05671): F the second moment of the loss's gradient at the output for tokens that the model
itself would say, which is the Fisher information, and H that of the input. Under both, leaving out a component costs
its value (`subspace`), in the same unit for every matrix. Truncation takes the model far from where it was measured, so
F is measured again on the model as truncated the time before, and averaged over the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.engine.backward import loss_backward, seen_linears
from compressor.engine.skeleton import Linear
from compressor.errors import UserError
from compressor.methods.decompose_settings import DecomposeSettings, DobiSettings, SvdLlmSettings, TransactSettings
from compressor.methods.decomposers import take_apart
from compressor.methods.gates import Room
from compressor.methods.ranks import Rank, energy_ranks, joint_ranks, total, uniform_ranks, welore_ranks
from compressor.methods.statistics import InputStatistics, accumulate
from compressor.methods.subspace import Components, in_basis
from compressor.run.gates import learn_gates
from compressor.run.gates_paper import learn_as_published
from compressor.run.ranks import (
    LATER_TOKENS,
    SURVEYED_TOKENS,
    budget_of,
    parameter_price,
    plain_ranks,
    price_of,
    settings_of,
)
from compressor.run.recipe import Stage
from compressor.run.session import Run
from compressor.run.transform import is_starved
from compressor.run.units import Unit, stacks


@dataclass
class Survey:
    """What is known of the matrices of a stage while their ranks are chosen; lists are in the order of ``linears``.

    Attributes:
        folder: where components and costs of every block lie.
        stacks: block -> matrices that may be taken apart together.
        values: name of a matrix or stack -> (p,) fp64, falling, the loss that each component adds when it is left out.
        costs: linear name -> F in the coordinates of its outputs, summed over rounds; of one block at a time.
        tokens: linear name -> tokens that reached it.
    """

    run: Run
    number: int
    stage: Stage
    linears: list[Linear]
    folder: Path
    stacks: dict[int, list[Unit]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def of(self, block: int) -> list[Linear]:
        """The matrices of one block."""
        return [linear for linear in self.linears if linear.block == block]

    def units(self, block: int) -> list[Unit]:
        """The matrices of one block, and those that may be taken apart together."""
        return [*(Unit((linear,)) for linear in self.of(block)), *self.stacks.get(block, [])]


def survey_ranks(run: Run, number: int) -> dict[str, Rank]:
    """Choose the ranks of stage ``number``, by linear name; for a stage of another kind, none.

    Raises:
        UserError: a budget that cannot be met, or no calibration windows.
    """
    stage = run.recipe.stages[number]
    settings = stage.settings
    if not isinstance(settings, DecomposeSettings) or isinstance(settings, TransactSettings):
        return {}
    linears = list(run.plan.targets[number])
    if not settings.surveyed:
        return plain_ranks(stage, linears, run.skeleton)
    if not isinstance(settings, SvdLlmSettings):
        values = {linear.name: take_apart(_weight(run, linear), None, settings).values for linear in linears}
        return _chosen(run, stage, linears, values)
    if run.inputs.calibration is None:
        raise UserError("choosing ranks needs calibration text", fix="--calibration FILE")
    folder = run.journal.folder / f"survey-{number}"
    folder.mkdir(exist_ok=True)
    survey = Survey(run, number, stage, linears, folder)
    ranks: dict[str, Rank] = {}
    rounds = settings.rounds if settings.ranks != "uniform" else 1
    with run.voice.progress(rounds) as ticker:
        for turn in range(rounds):
            ticker.now("surveying what components are worth")
            _measure(survey, ranks, turn)
            ranks = _settle(survey, turn)
            ticker.advance()
    if isinstance(settings, DobiSettings) and settings.fit == "paper":
        ranks = _learned_as_published(survey)
    elif settings.ranks == "dobi":
        ranks = _learned(survey, ranks)
    for block in range(run.blocks):
        _components_file(folder, block).unlink(missing_ok=True)
    return ranks


def cost_of(run: Run, number: int, unit: Unit) -> Tensor | None:
    """What errors at the outputs of a unit cost by the survey of stage ``number``; None: every one the same."""
    settings = settings_of(run.recipe.stages[number], unit.members[0])
    if not isinstance(settings, SvdLlmSettings) or settings.weighting != "loss":
        return None
    file = _costs_file(run.journal.folder / f"survey-{number}", unit.block)
    return load_file(file).get(unit.name) if file.exists() else None


def _measure(survey: Survey, ranks: Mapping[str, Rank], turn: int) -> None:
    """One pass forwards and backwards with the matrices truncated to ``ranks``; adds to the costs on disk."""
    run, calibration = survey.run, survey.run.inputs.calibration
    assert calibration is not None  # checked before
    ids = _windows(calibration.ids, turn)
    hessians: dict[str, Tensor] = {}
    costs: dict[str, Tensor] = {}
    counted: dict[str, int] = {}
    widths = {linear.name: linear.shape for linear in survey.linears}
    inputs: dict[str, int] = {}

    def see(name: str, x: Tensor, g: Tensor) -> None:
        m, n = widths[name]
        if name not in costs:
            inputs[name] = (
                x.data_ptr()
            )  # no other is alive with the same: all of a batch are kept for its backward pass
            costs[name] = torch.zeros(m, m, device=g.device)
            hessians[name] = torch.zeros(n, n, device=x.device)
        accumulate(costs[name], g)
        counted[name] = counted.get(name, 0) + len(x)
        if not turn:
            accumulate(hessians[name], x)

    class Around:
        """Watches a block while it is run backwards; afterwards puts down what was seen."""

        def __init__(self, block: int) -> None:
            self.block = block
            self.hooks = seen_linears(run.runner, survey.of(block), see)

        def __enter__(self) -> None:
            self.hooks.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.hooks.__exit__(*error)
            if error[0] is None:
                if not turn and getattr(survey.stage.settings, "joint", False):
                    survey.stacks[self.block] = stacks(survey.of(self.block), inputs)
                _put_down(survey, self.block, turn, hessians, costs, counted)
            hessians.clear()
            costs.clear()
            inputs.clear()

    def weights(block: int) -> dict[str, Tensor]:
        return truncated(survey, block, ranks) if ranks else {}

    generator = torch.Generator().manual_seed(run.recipe.calibration.seed)
    loss_backward(run.runner, run.runner.start(ids), survey.folder, weights=weights, sampled=generator, around=Around)


def _windows(ids: Tensor, turn: int) -> Tensor:
    """The windows of a round: many in the first one, fewer, and other ones, in those that follow."""
    length = ids.shape[1]
    if not turn:
        return ids[: max(1, SURVEYED_TOKENS // length)]
    count = max(1, min(len(ids), LATER_TOKENS // length))
    start = (turn - 1) * count % max(1, len(ids) - count + 1)
    return ids[start : start + count]


def _put_down(
    survey: Survey,
    block: int,
    turn: int,
    hessians: Mapping[str, Tensor],
    costs: Mapping[str, Tensor],
    counted: Mapping[str, int],
) -> None:
    """Write what errors at the outputs of a block's linears cost, and in the first round the moments of the inputs."""
    file = _costs_file(survey.folder, block)
    before = load_file(file) if turn else {}
    found: dict[str, Tensor] = {}
    for unit in survey.units(block):
        if all(linear.name in costs for linear in unit.members):
            means = [costs[linear.name] / max(1, counted[linear.name]) for linear in unit.members]
            cost: Tensor = torch.block_diag(*means)  # type: ignore[no-untyped-call]
            here = in_basis(cost, _stacked(survey.run, unit)).cpu()
            found[unit.name] = here + before[unit.name] if unit.name in before else here
    save_file(found, file)
    if not turn:
        survey.tokens |= {linear.name: counted.get(linear.name, 0) for linear in survey.of(block)}
        save_file({name: H.cpu() for name, H in hessians.items()}, _moments_file(survey.folder, block))


def _settle(survey: Survey, turn: int) -> dict[str, Rank]:
    """Take every matrix apart under what is known, and choose the ranks."""
    run, total_tokens = survey.run, max(survey.tokens.values(), default=0)
    for block in range(run.blocks):
        costs = load_file(_costs_file(survey.folder, block))
        moments = load_file(_moments_file(survey.folder, block))
        kept: dict[str, Tensor] = {}
        for unit in survey.units(block):
            first = unit.members[0]
            tokens = survey.tokens.get(first.name, 0)
            if first.name not in moments or is_starved(first.name, tokens, total_tokens):
                survey.values.pop(unit.name, None)
                continue
            settings = settings_of(survey.stage, first)
            F, H = costs[unit.name].to(run.runner.device), moments[first.name].to(run.runner.device)
            weighted = isinstance(settings, SvdLlmSettings) and settings.weighting == "loss"
            scale = 1.0 if weighted else float(F.diagonal().double().sum()) / unit.shape[0]
            stats = InputStatistics(H, tokens)
            parts = take_apart(_stacked(run, unit), stats, settings, F if weighted else None)
            survey.values[unit.name] = parts.values.cpu() * scale / (2 * tokens * (turn + 1))
            kept |= _pack(unit.name, parts)
        save_file(kept, _components_file(survey.folder, block))
    ranks = _chosen(run, survey.stage, survey.linears, survey.values)
    joint = [unit for units in survey.stacks.values() for unit in units if unit.name in survey.values]
    return _joined(survey, ranks, joint) if joint else ranks


def _joined(survey: Survey, ranks: dict[str, Rank], joint: list[Unit]) -> dict[str, Rank]:
    """The ranks with some matrices taken apart together; what nothing is known of keeps its own."""
    settings = survey.stage.settings
    assert isinstance(settings, SvdLlmSettings)
    known = [Unit((linear,)) for linear in survey.linears if linear.name in survey.values]
    units = [*known, *joint]
    places = {unit.name: i for i, unit in enumerate(units)}
    prices = [parameter_price(settings_of(survey.stage, unit.members[0]), unit.shape) for unit in units]
    budget = budget_of(survey.stage, survey.linears, survey.run.skeleton)
    rest = [linear for linear in survey.linears if linear.name not in places]
    budget -= total([ranks[x.name] for x in rest], [price_of(survey.stage, x) for x in rest])
    groups = [([places[linear.name] for linear in unit.members], places[unit.name]) for unit in joint]
    found = joint_ranks([survey.values[unit.name] for unit in units], prices, budget, groups)
    chosen = {unit.name: rank for unit, rank in zip(units, found, strict=True) if rank != 0}
    return {**{linear.name: ranks[linear.name] for linear in rest}, **chosen}


def _chosen(run: Run, stage: Stage, linears: list[Linear], values: Mapping[str, Tensor]) -> dict[str, Rank]:
    """The ranks by the stage's rule; matrices of which nothing is known get their share."""
    settings = stage.settings
    assert isinstance(settings, DecomposeSettings)
    if settings.ranks == "uniform":
        return plain_ranks(stage, linears, run.skeleton)
    budget = budget_of(stage, linears, run.skeleton)
    prices = {linear.name: price_of(stage, linear) for linear in linears}
    unknown = [linear.name for linear in linears if linear.name not in values]
    share = budget / sum(price.whole for price in prices.values())
    plain = [prices[name] for name in unknown]
    ranks = (
        dict(zip(unknown, uniform_ranks(plain, share * sum(p.whole for p in plain)), strict=True)) if unknown else {}
    )
    known = [name for name in prices if name not in ranks]
    left = budget - total(list(ranks.values()), plain)
    offered = [prices[name] for name in known]
    if settings.ranks == "welore":
        found = welore_ranks([values[name] for name in known], offered, left)
    else:
        found = energy_ranks([values[name] for name in known], offered, left)
    return ranks | dict(zip(known, found, strict=True))


def truncated(survey: Survey, block: int, ranks: Mapping[str, Rank]) -> dict[str, Tensor]:
    """The weights of a block's matrices cut down to ``ranks``, as its modules hold them."""
    parts = load_components(survey, block)
    found = {}
    for unit in survey.units(block):
        rank = ranks.get(unit.name)
        if unit.name in parts and rank is not None:
            product = parts[unit.name].left[:, :rank] @ parts[unit.name].right[:rank]
            for linear, weight in zip(unit.members, unit.split(product), strict=True):
                found[f"{linear.name}.weight"] = as_held(survey.run, linear, weight)
    return found


def as_held(run: Run, linear: Linear, weight: Tensor) -> Tensor:
    """A weight (m, n) in the module's layout, device and compute dtype."""
    weight = weight.to(run.runner.device, run.runner.dtype)
    return weight.T if linear.transposed else weight


def load_components(survey: Survey, block: int) -> dict[str, Components]:
    """The components of a block's matrices and stacks as the last round left them, by name."""
    stored = load_file(_components_file(survey.folder, block))
    return {
        unit.name: Components(*(stored[f"{unit.name}.{part}"] for part in ("values", "left", "right")))
        for unit in survey.units(block)
        if f"{unit.name}.values" in stored
    }


def _learned(survey: Survey, ranks: dict[str, Rank]) -> dict[str, Rank]:
    """Positions of truncation learned on the calibration text, from those that the curvature gives.

    Matrices that stay whole by the curvature stay so.
    """
    settings = survey.stage.settings
    assert isinstance(settings, SvdLlmSettings)  # no other is learned
    cut = [linear for linear in survey.linears if linear.name in survey.values and ranks[linear.name] is not None]
    if not cut:
        return ranks
    prices = {linear.name: price_of(survey.stage, linear) for linear in survey.linears}
    names = {linear.name for linear in cut}
    rest = [linear.name for linear in survey.linears if linear.name not in names]
    budget = budget_of(survey.stage, survey.linears, survey.run.skeleton)
    budget -= total([ranks[name] for name in rest], [prices[name] for name in rest])
    room = Room([prices[linear.name] for linear in cut], budget)
    begin = [ranks[linear.name] for linear in cut]
    found = learn_gates(
        survey.run, survey.folder, cut, lambda block: load_components(survey, block), begin, room, settings.steps
    )
    return ranks | {linear.name: rank for linear, rank in zip(cut, found, strict=True)}


def _learned_as_published(survey: Survey) -> dict[str, Rank]:
    """Positions of truncation learned as published; whole stays what no rank makes smaller."""
    settings = survey.stage.settings
    assert isinstance(settings, SvdLlmSettings)  # no other is learned
    prices = {linear.name: price_of(survey.stage, linear) for linear in survey.linears}
    cut = [linear for linear in survey.linears if prices[linear.name].most]
    budget = budget_of(survey.stage, survey.linears, survey.run.skeleton)
    budget -= sum(price.whole for price in prices.values() if not price.most)
    room = Room([prices[linear.name] for linear in cut], budget)
    found = learn_as_published(survey.run, survey.folder, cut, room, settings.steps) if cut else []
    learned = dict(zip((linear.name for linear in cut), found, strict=True))
    return {linear.name: learned.get(linear.name) for linear in survey.linears}


def _pack(name: str, parts: Components) -> dict[str, Tensor]:
    found = {"values": parts.values, "left": parts.left, "right": parts.right}
    return {f"{name}.{part}": tensor.cpu().contiguous() for part, tensor in found.items()}


def _stacked(run: Run, unit: Unit) -> Tensor:
    return torch.cat([_weight(run, linear) for linear in unit.members])


def _weight(run: Run, linear: Linear) -> Tensor:
    weight = run.skeleton.read(f"{linear.name}.weight").to(run.runner.device, torch.float32)
    return weight.T.contiguous() if linear.transposed else weight


def _costs_file(folder: Path, block: int) -> Path:
    return folder / f"costs-{block:05d}.safetensors"


def _moments_file(folder: Path, block: int) -> Path:
    return folder / f"moments-{block:05d}.safetensors"


def _components_file(folder: Path, block: int) -> Path:
    return folder / f"components-{block:05d}.safetensors"
