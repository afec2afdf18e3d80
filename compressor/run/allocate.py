"""Sparsities that differ from block to block: one pass of the untouched model over the calibration windows."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.engine.observe import inputs_hooked
from compressor.methods.owl import allocate, outlier_score
from compressor.methods.settings import PruneSettings
from compressor.run.session import Run


def survey(run: Run, number: int) -> list[float] | None:
    """Sparsity of every block for stage ``number``, or ``None`` where all are alike.

    A block's score is the mean of its matrices' outlier scores, weighted by their sizes; blocks without targets count
    nothing.
    """
    stage = run.recipe.stages[number]
    settings = stage.settings
    if not isinstance(settings, PruneSettings) or settings.allocation != "owl" or run.inputs.calibration is None:
        return None
    target = settings.share  # owl and a pattern exclude each other
    stream = run.runner.start(run.inputs.calibration.ids)
    scores, sizes = [], []
    with run.voice.progress(run.blocks) as ticker:
        for block in range(run.blocks):
            ticker.now("surveying outliers")
            linears = [linear for linear in run.plan.targets[number] if linear.block == block]
            modules = {linear.name: run.skeleton.model.get_submodule(linear.name) for linear in linears}
            squares: dict[str, Tensor] = {}

            def hook(name: str, x: Tensor, squares: dict[str, Tensor] = squares) -> None:
                rows = x.reshape(-1, x.shape[-1]).float()
                squares[name] = squares.get(name, torch.zeros_like(rows[0])) + rows.square().sum(0)

            run.runner.load_block(block)
            with inputs_hooked(modules, hook):
                run.runner.step(block, stream)
            weighted, size = 0.0, 0
            for linear in linears:
                weight = run.skeleton.read(f"{linear.name}.weight").to(run.runner.device)
                weight = weight.T if linear.transposed else weight
                norms = squares.get(linear.name, torch.zeros(linear.shape[1], device=weight.device)).sqrt()
                weighted += outlier_score(weight, norms, settings.owl_threshold) * weight.numel()
                size += weight.numel()
            scores.append(weighted / size if size else 0.0)
            sizes.append(size)
            run.runner.release_block(block)
            ticker.advance()
    touched = [block for block in range(run.blocks) if sizes[block]]
    shares = allocate([scores[b] for b in touched], target, settings.owl_band, [sizes[b] for b in touched])
    by_block = dict(zip(touched, shares, strict=True))
    return [by_block.get(block, target) for block in range(run.blocks)]
