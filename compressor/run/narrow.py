"""Making a model narrower inside its modules, one block after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from compressor.engine.observe import observe
from compressor.engine.skeleton import Linear
from compressor.formats import Dense
from compressor.methods.decompose_settings import TransactSettings
from compressor.methods.narrowing import (
    expand_columns,
    expand_output,
    expand_rows,
    expand_values,
    narrow_values_of,
)
from compressor.methods.statistics import InputStatistics
from compressor.methods.transact import eliminate, narrow_mlp
from compressor.methods.transact_values import improve, value_bases
from compressor.run.narrow_plan import OUTPUT, VALUES
from compressor.run.session import Run
from compressor.run.transform import BlockWork, remark


def narrow_block(run: Run, number: int, block: int, work: BlockWork) -> None:
    """Narrow a loaded block: its values, and then its MLP on what they have become.

    The block goes on in its old shapes, computing the same; ``work.narrow`` has what is written.
    """
    narrowing, stream = run.plan.narrowing, run.streams[f"stage {number}"]
    assert narrowing is not None  # the recipe has such a stage
    prefix = run.skeleton.block_names[block]
    linears = {linear.name: linear for linear in run.skeleton.linears if linear.block == block}
    settings = run.stages[number].settings
    assert isinstance(settings, TransactSettings)
    if narrowing.dims < narrowing.dims_before:
        output, values = linears[f"{prefix}.{OUTPUT}"], linears[f"{prefix}.{VALUES}"]
        began = time.perf_counter()
        stats = observe(run.runner, block, [output], stream).statistics[output.name]
        W, V = (_weight(run, linear) for linear in (output, values))
        dim = narrowing.dims_before
        bases, _ = value_bases(W, stats.hessian, len(V) // dim, dim, settings.damp)
        found = improve(W, stats.hessian, bases[:, :, : narrowing.dims].contiguous(), settings.damp)
        for leaf in ("weight", "bias"):
            if (name := f"{values.name}.{leaf}") in run.skeleton.origins:
                narrow = narrow_values_of(run.runner.loaded(name).float(), found.bases)
                _put(run, work, name, narrow, lambda x: expand_values(x, found.bases))
        _put(run, work, f"{output.name}.weight", found.output, lambda x: expand_output(x, found.bases))
        note = f"values of {narrowing.dims} dimensions instead of {dim}"
        _describe(run, work, [values], None, stats, note, began)
        _describe(run, work, [output], found.relative_loss, stats, note, began)
    if narrowing.neurons < narrowing.neurons_before:
        began = time.perf_counter()
        down = linears[f"{prefix}.{narrowing.names.out}"]
        stats = observe(run.runner, block, [down], stream).statistics[down.name]
        W, n = _weight(run, down), narrowing.neurons_before
        kept = eliminate(W, stats.hessian, n - narrowing.neurons, settings.damp).kept(n, narrowing.neurons)
        mlp = narrow_mlp(W, stats.hessian, kept, settings.damp)
        _put(run, work, f"{down.name}.weight", mlp.down, lambda x: expand_columns(x, kept, n))
        rows = torch.cat([kept + part * n for part in range(narrowing.names.stacked)])
        into = [linears[f"{prefix}.{name}"] for name in narrowing.names.into]
        for name in (f"{linear.name}.{leaf}" for linear in into for leaf in ("weight", "bias")):
            if name in run.skeleton.origins:
                whole = run.runner.loaded(name).float()
                _put(run, work, name, whole[rows], partial(expand_rows, kept=rows, outputs=len(whole)))
        note = f"{narrowing.neurons} of {n} neurons"
        _describe(run, work, into, None, stats, note, began)
        _describe(run, work, [down], mlp.relative_loss, stats, note, began)


def _weight(run: Run, linear: Linear) -> Tensor:
    weight = run.runner.loaded(f"{linear.name}.weight").float()
    return weight.T.contiguous() if linear.transposed else weight


def _put(run: Run, work: BlockWork, name: str, narrow: Tensor, expand: Callable[[Tensor], Tensor]) -> None:
    """Keep a narrow tensor as it is written, and let the loaded block go on with what it stands for."""
    stored = narrow.to(run.skeleton.stored(name)[0])
    work.narrow[name] = stored.cpu()
    wide = expand(stored.float().to(run.runner.device))
    run.runner.set_weight(name, wide)
    if (module := name.removesuffix(".weight")) in work.weights:
        work.weights[module] = Dense(wide.cpu())


def _describe(
    run: Run,
    work: BlockWork,
    linears: list[Linear],
    error: float | None,
    stats: InputStatistics,
    note: str,
    began: float,
) -> None:
    for linear in linears:
        tensor = work.narrow[f"{linear.name}.weight"]
        size = tensor.numel() * tensor.itemsize
        remark(work, linear, [note])
        work.layers[linear.name] |= {
            "method": "transact",
            "bits_per_weight": 8 * size / (linear.shape[0] * linear.shape[1]),
            "bytes": size,
            "relative_error": error,
            "tokens": stats.tokens,
            "seconds": time.perf_counter() - began,
        }
