"""``--planes auto``: what one, two and three trit planes in a matrix do to its block's output, found on the model."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.engine.forward import Stream
from compressor.engine.skeleton import Linear
from compressor.errors import UserError
from compressor.methods.plane_budget import choose_planes
from compressor.methods.quantizers import quantize
from compressor.run.planes import PLANES, automatic, budget_bits, plane_bits, with_planes
from compressor.run.recipe import Stage
from compressor.run.session import Run

SURVEYED_TOKENS = 4096
"""As many calibration tokens are sent through every block for every matrix and number of planes."""

SURVEYED_ROWS = 256
"""As many rows of a matrix are fitted, evenly spread; the errors of the others are taken to be like theirs."""


def survey_planes(run: Run, number: int) -> dict[str, int]:
    """Find the numbers of planes for stage ``number``: linear name -> planes.

    For every matrix and number, the error of the block's output relative to the power of the residual stream, with this
    one matrix fitted to its weights alone and everything before untouched.

    Raises:
        UserError: no calibration windows.
    """
    stage = run.recipe.stages[number]
    chosen = automatic(stage, run.plan.targets[number])
    if not chosen:
        return {}
    if run.inputs.calibration is None:
        raise UserError("planes auto needs calibration text", fix="--calibration FILE")
    ids = run.inputs.calibration.ids
    stream = run.runner.start(ids[: max(1, SURVEYED_TOKENS // ids.shape[1])])
    errors: dict[str, dict[int, float]] = {}
    with run.voice.progress(run.blocks) as ticker:
        for block in range(run.blocks):
            ticker.now("surveying trit planes")
            run.runner.load_block(block)
            whole = [run.runner.forward(block, stream, batch, span) for batch, span in stream.batches()]
            for linear in (linear for linear in chosen if linear.block == block):
                errors[linear.name] = _errors(run, stage, linear, stream, whole)
            run.runner.step(block, stream)
            run.runner.release_block(block)
            ticker.advance()
    bits = [plane_bits(stage, linear) for linear in chosen]
    planes = choose_planes([errors[linear.name] for linear in chosen], bits, budget_bits(stage, chosen))
    return {linear.name: found for linear, found in zip(chosen, planes, strict=True)}


def _errors(run: Run, stage: Stage, linear: Linear, stream: Stream, whole: list[Tensor]) -> dict[int, float]:
    """Number of planes -> error of the block's output relative to ``whole``, its untouched batches. It is loaded."""
    runner = run.runner
    weight = run.skeleton.read(f"{linear.name}.weight").to(runner.device, torch.float32)
    weight = weight.T if linear.transposed else weight
    power = sum(float(out.double().square().sum()) for out in whole)
    rows = torch.arange(0, len(weight), max(1, -(-len(weight) // SURVEYED_ROWS)), device=weight.device)
    share = len(rows) / len(weight)
    found = {}
    for planes in PLANES:
        settings = with_planes(stage, linear.name, planes).model_copy(update={"fit": "data-free", "correct": 0})
        fitted = quantize(stage.name, weight[rows], None, settings).code.dense().to(runner.device)
        value = weight.index_copy(0, rows, fitted).to(runner.dtype)
        weights = {f"{linear.name}.weight": value.T if linear.transposed else value}
        error = 0.0
        for (number, span), out in zip(stream.batches(), whole, strict=True):
            changed = runner.forward_with(linear.block, stream, number, span, weights).double()
            error += float((changed - out.double()).square().sum())
        found[planes] = error / share / max(power, 1e-30)
    return found
