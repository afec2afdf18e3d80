"""After a stage has quantized a block: let its weights learn together, against what the block gave before."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.observe import Observation
from compressor.engine.skeleton import Linear
from compressor.engine.tune import Learner, tune
from compressor.formats import GroupInt, PartialBinary, Representation, ScaledBinary, Sum, TritPlanes
from compressor.methods.learned import FlexRoundLearner, ScaledBinaryLearner, SignLearner, SumLearner, TritLearner
from compressor.methods.prepared import PreparedLearner
from compressor.methods.ptq161 import salient_inputs
from compressor.methods.quantize_settings import Ptq161Settings, QuantizeSettings
from compressor.run.recipe import Stage
from compressor.run.transform import BlockWork, install

LEARNERS: dict[type, type] = {
    GroupInt: FlexRoundLearner,
    TritPlanes: TritLearner,
    PartialBinary: SignLearner,
    ScaledBinary: ScaledBinaryLearner,
}


def learner_of(code: Representation, weight: Tensor) -> Learner:
    """The learner that starts at ``code``, made from ``weight`` (m, n) fp32."""
    if isinstance(code, Sum):
        rest = weight - code.correction.dense().to(weight.device)
        return SumLearner(code, learner_of(code.base, rest))
    learner: Learner = LEARNERS[type(code)](code, weight)
    return learner


def prepare_stage(
    stage: Stage,
    linears: list[Linear],
    work: BlockWork,
    seen: Observation,
    runner: BlockRunner,
    block: int,
    stream: Stream,
    targets: Tensor,
) -> None:
    """Let the weights of ``linears`` learn to bear binarization, and put them into ``work`` and the loaded block.

    Args:
        seen: statistics of the inputs, which decide what stays.
        stream, targets: as for `tune_stage`.
    """
    settings = stage.settings
    assert isinstance(settings, Ptq161Settings)  # no other stage is prepared
    learners: dict[str, tuple[Linear, Learner]] = {}
    for linear in linears:
        weight = work.weights[linear.name].dense().to(runner.device, torch.float32)
        salient = salient_inputs(weight, seen.statistics[linear.name], settings)
        learners[linear.name] = (linear, PreparedLearner(weight, salient))
    tuned = tune(runner, block, stream, targets, learners, steps=settings.preprocess, rate=settings.tune_rate)
    note = f"prepared with its block: error {tuned.before:.4f} -> {tuned.after:.4f} as it would be binarized"
    for name, (linear, learner) in learners.items():
        if tuned.step:
            install(work, linear, learner.finish(), runner)
        work.layers[name]["notes"] = [*work.layers[name].get("notes", []), note]


def tune_stage(
    stage: Stage,
    linears: list[Linear],
    work: BlockWork,
    before: dict[str, Tensor],
    runner: BlockRunner,
    block: int,
    stream: Stream,
    targets: Tensor,
) -> None:
    """Learn the codes of ``linears``, put the result into ``work`` and into the loaded block, and note what it did.

    Args:
        before: linear name -> weight (m, n) that the stage was given.
        stream: states that enter the block, behind quantized blocks.
        targets: what the block gave before this stage, for the states that enter it behind untouched blocks.
    """
    settings = stage.settings
    assert isinstance(settings, QuantizeSettings)  # no other stage is tuned
    learners: dict[str, tuple[Linear, Learner]] = {}
    for linear in linears:
        code = work.weights[linear.name]
        weight = before[linear.name].to(runner.device, torch.float32)
        learners[linear.name] = (linear, learner_of(code, weight))
    tuned = tune(runner, block, stream, targets, learners, steps=settings.tune_steps, rate=settings.tune_rate)
    note = (
        f"tuned with its block: error of the output on held-out windows {tuned.before:.4f} -> {tuned.after:.4f} (best "
        f" after {tuned.step} of {settings.tune_steps} steps)"
    )
    for name, (linear, learner) in learners.items():
        if tuned.step:
            install(work, linear, learner.finish(), runner)
            work.layers[name]["relative_error"] = None  # measured before; the tuned weights make other errors together
        work.layers[name]["notes"] = [*work.layers[name].get("notes", []), note]
