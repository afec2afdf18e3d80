"""Before a stage rounds a block: scale inputs, in the linears that read them and in what makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.observe import Observation
from compressor.engine.producers import Fold, Producer, find_folds
from compressor.engine.skeleton import Linear
from compressor.formats import Dense, Masked
from compressor.methods.awq import Reader, find_scales
from compressor.methods.quantize_settings import AwqSettings
from compressor.methods.statistics import InputStatistics, all_finite
from compressor.run.recipe import Stage
from compressor.run.transform import BlockWork, is_starved

NOT_FOLDED = "input not scaled: nothing in the block that could be scaled in return"


def fold_scales(
    stage: Stage,
    linears: Sequence[Linear],
    work: BlockWork,
    seen: Observation,
    runner: BlockRunner,
    block: int,
    stream: Stream,
) -> None:
    """Choose scales for the inputs of ``linears``, and fold them into the loaded block, ``work`` and ``seen``.

    Afterwards the block computes what it did (up to the rounding of norms that multiply by 1 + weight, for which the
    linears make up), and weights, originals and statistics of the scaled linears are those of the scaled inputs. Does
    nothing for a stage whose settings do not ask for scales.
    """
    settings = stage.settings
    if not isinstance(settings, AwqSettings) or not settings.steps:
        return
    plain = [x for x in linears if isinstance(work.weights[x.name], (Dense, Masked))]
    shared = _shared(plain, seen, stream.ids.numel())
    folded = set()
    for fold in find_folds(runner, block, stream, shared, plain):
        statistics = seen.statistics[fold.readers[0].name]
        exponents = find_scales(
            [_reader(stage, linear, work, runner) for linear in fold.readers],
            statistics.hessian,
            fold.source.to(runner.device),
            settings.steps,
        ).cpu()
        folded |= {linear.name for linear in fold.readers}
        if bool(exponents.any()):
            _apply(fold, exponents, work, statistics, seen, runner)
    for linear in linears:
        if linear.name not in folded:
            _note(work, linear.name, NOT_FOLDED)


def _shared(linears: Sequence[Linear], seen: Observation, total: int) -> list[list[Linear]]:
    """Groups of linears that read the same input, where there are statistics to go by."""
    groups: dict[int, list[Linear]] = {}
    for linear in linears:
        statistics = seen.statistics[linear.name]
        usable = seen.calls[linear.name] <= 1 and statistics.tokens and all_finite(statistics.hessian)
        if usable and not is_starved(linear.name, statistics.tokens, total):
            groups.setdefault(id(statistics), []).append(linear)
    return list(groups.values())


def _reader(stage: Stage, linear: Linear, work: BlockWork, runner: BlockRunner) -> Reader:
    settings = stage.settings_of(linear.name)
    assert isinstance(settings, AwqSettings)
    return Reader(work.weights[linear.name].dense().to(runner.device, torch.float32), settings)


def _apply(
    fold: Fold,
    exponents: Tensor,
    work: BlockWork,
    statistics: InputStatistics,
    seen: Observation,
    runner: BlockRunner,
) -> None:
    """Fold scales 2^``exponents`` (channels,) of an input: the readers times them, what makes the input by them."""
    factors = _scale_producer(fold.producer, torch.exp2(-exponents).double(), work, runner)[fold.source]
    low, high = torch.exp2(torch.stack(exponents.aminmax())).tolist()
    note = f"codes are of the weights times {low:.2g} to {high:.2g} (AWQ), folded into {fold.producer.module}"
    for linear in fold.readers:
        _scale(work, runner, linear, lambda weight: weight / factors)
        _note(work, linear.name, note)
    f = factors.to(statistics.hessian)
    scaled = InputStatistics(statistics.hessian * f * f[:, None], statistics.tokens)
    seen.statistics |= {linear.name: scaled for linear in fold.readers}


def _scale_producer(producer: Producer, factors: Tensor, work: BlockWork, runner: BlockRunner) -> Tensor:
    """Multiply channels by ``factors`` (channels,), and return by what they were multiplied once it was rounded."""
    bias = f"{producer.module}.bias"
    before = _stored(work, runner, bias) if bias in runner.skeleton.origins else None
    if producer.form == "linear":
        linear = next(x for x in runner.skeleton.linears if x.name == producer.module)
        _scale(work, runner, linear, lambda weight: producer.scaled(weight, None, factors)[0])
        if before is not None:
            _replace(work, runner, bias, producer.scaled(torch.empty(len(before), 0), before, factors)[1])
        return factors
    name = f"{producer.module}.weight"
    weight = _stored(work, runner, name)
    shift = 1 if producer.form == "offset norm" else 0
    told = (producer.scaled(weight, None, factors)[0].double() + shift) / (weight.double() + shift)
    factors = torch.where(told.isfinite() & (told > 0), told, 1)
    rounded, after = producer.scaled(weight, before, factors)
    _replace(work, runner, name, rounded)
    _replace(work, runner, bias, after)
    return factors


def _scale(work: BlockWork, runner: BlockRunner, linear: Linear, change: Callable[[Tensor], Tensor]) -> None:
    """Change the weight (m, n) of a linear, here and in the loaded block, and remember what it was."""
    name = f"{linear.name}.weight"
    work.unfolded.setdefault(name, work.originals[linear.name])
    work.originals[linear.name] = change(work.originals[linear.name].double()).float()
    before = work.weights[linear.name]
    assert isinstance(before, (Dense, Masked))  # no other is folded into
    weight = change(before.weight.double()).float()
    work.weights[linear.name] = replace(before, weight=weight)
    value = work.weights[linear.name].dense()
    runner.set_weight(name, value.T if linear.transposed else value)


def _replace(work: BlockWork, runner: BlockRunner, name: str, value: Tensor | None) -> None:
    """Give a tensor of the block that is no matrix another value, here and in the loaded block."""
    if value is not None:
        work.unfolded.setdefault(name, _stored(work, runner, name))
        work.folded[name] = value
        runner.set_weight(name, value)


def _stored(work: BlockWork, runner: BlockRunner, name: str) -> Tensor:
    return work.folded[name] if name in work.folded else runner.skeleton.read(name)


def _note(work: BlockWork, name: str, note: str) -> None:
    work.layers[name]["notes"] = [*work.layers[name].get("notes", []), note]
