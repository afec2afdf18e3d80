"""Second moments of what enters the linears of a block, gathered while it runs.

Linears that are given the very same tensor (q, k, v; gate, up) share one Hessian, and so one factorization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.skeleton import Linear
from compressor.errors import UserError
from compressor.methods.statistics import (
    InputStatistics,
    accumulate,
    accumulate_drift,
    accumulate_moments,
    all_finite,
)


@dataclass
class Observation:
    """What was seen of a block's inputs.

    Attributes:
        statistics: linear name -> statistics (the same object for linears that share their input).
        calls: linear name -> calls within the first forward pass; more than 1 means a weight used repeatedly.
        bad_tokens: linear name -> input rows with NaN or infinite values, which were left out.
    """

    statistics: dict[str, InputStatistics] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    bad_tokens: dict[str, int] = field(default_factory=dict)


class _SeenEnoughError(Exception):
    """Leaves a block behind its last linear."""


class _Gatherer:
    """Finds out in the first batch who shares whose input; accumulates for the leaders only."""

    def __init__(self, linears: list[Linear], device: torch.device, *, moments: bool) -> None:
        self.moments = moments
        self.untouched: dict[str, Tensor] | None = None  # the same batch's inputs behind untouched blocks
        self.widths = {linear.name: linear.shape[1] for linear in linears}
        self.device = device
        self.seen = Observation(calls=dict.fromkeys(self.widths, 0), bad_tokens=dict.fromkeys(self.widths, 0))
        self.leaders: dict[str, str] = {}
        # The inputs of the first batch stay referenced until it is over, so that no address serves twice.
        self.inputs: list[tuple[str, Tensor]] | None = []
        self.last = ""  # the linear that was reached last

    def __call__(self, name: str, x: Tensor) -> None:
        if self.inputs is None and name == self.last:
            self.record(name, x)
            raise _SeenEnoughError
        self.record(name, x)

    def remember(self, name: str, x: Tensor) -> None:
        """Keep an input of the reference."""
        assert self.untouched is not None
        self.untouched[name] = x
        if self.inputs is None and name == self.last:
            raise _SeenEnoughError

    def end_first_batch(self) -> None:
        """Let go of the inputs. What comes after the last linear is thrown away, so later batches stop there, unless
        linears are called several times or, as experts are, in an order that depends on the data."""
        self.inputs = None
        if any(calls != 1 for calls in self.seen.calls.values()) or any(".experts." in name for name in self.widths):
            self.last = ""

    def record(self, name: str, x: Tensor) -> None:
        if self.inputs is not None:
            self._learn(name, x, self.inputs)
        leader = self.leaders.setdefault(name, _expert_leader(name, self.widths) or name)
        statistics = self.statistics(leader)
        if leader == name:
            self._add(name, x, statistics)

    def _learn(self, name: str, x: Tensor, inputs: list[tuple[str, Tensor]]) -> None:
        self.seen.calls[name] += 1
        self.last = name
        source = next((owner for owner, other in inputs if _same(other, x)), None)
        if name not in self.leaders:
            self.leaders[name] = source or _expert_leader(name, self.widths) or name
        elif self.leaders[name] != name and source != self.leaders[name]:
            raise UserError(
                f"{name} is called several times with inputs that it shares only sometimes",
                fix=f"leave it out with --exclude '{name}'",
            )
        inputs.append((self.leaders[name], x))

    def statistics(self, leader: str) -> InputStatistics:
        if leader not in self.seen.statistics:
            n = self.widths[leader]
            self.seen.statistics[leader] = InputStatistics(torch.zeros(n, n, device=self.device), 0)
        return self.seen.statistics[leader]

    def _add(self, name: str, x: Tensor, statistics: InputStatistics) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if self.untouched is not None:
            self._add_drift(name, rows, statistics)
        if not all_finite(rows):
            finite = torch.isfinite(rows).all(dim=-1)
            self.seen.bad_tokens[name] += int((~finite).sum())
            rows = rows[finite]
        accumulate(statistics.hessian, rows)
        statistics.tokens += len(rows)
        if self.moments:
            accumulate_moments(statistics, rows)

    def _add_drift(self, name: str, rows: Tensor, statistics: InputStatistics) -> None:
        """Experts that were sent other tokens, and inputs that are not finite, have no drift to speak of."""
        assert self.untouched is not None
        before = self.untouched.get(name, rows[:0]).reshape(-1, rows.shape[-1])
        if before.shape == rows.shape and all_finite(rows) and all_finite(before):
            if statistics.drift is None:
                statistics.drift = torch.zeros_like(statistics.hessian)
            accumulate_drift(statistics.drift, before, rows)

    def finish(self) -> Observation:
        for name in self.widths:
            leader = self.leaders.get(name) or _expert_leader(name, self.widths) or name
            self.seen.statistics[name] = self.statistics(leader)
            self.seen.bad_tokens[name] = self.seen.bad_tokens[leader]
        return self.seen


def observe(
    runner: BlockRunner,
    block: int,
    linears: list[Linear],
    stream: Stream,
    reference: Stream | None = None,
    *,
    weights: dict[str, Tensor] | None = None,
    untouched: dict[str, Tensor] | None = None,
    moments: bool = False,
) -> Observation:
    """Run a stream through a loaded block, outputs discarded, and gather the statistics of ``linears``.

    Args:
        reference: the same windows behind untouched blocks: then the statistics tell how far the inputs have drifted.
        weights: module tensor name -> value that the block is run with, in place of what is loaded.
        untouched: the same for the reference.
        moments: gather the sums of the inputs and of their sizes too.
    """
    modules = {linear.name: runner.skeleton.model.get_submodule(linear.name) for linear in linears}
    gatherer = _Gatherer(linears, runner.device, moments=moments)
    with torch.no_grad():
        for number, span in stream.batches():
            if reference is not None:
                gatherer.untouched = {}
                with inputs_hooked(modules, gatherer.remember), suppress(_SeenEnoughError):
                    runner.forward_with(block, reference, number, span, untouched or {})
            with inputs_hooked(modules, gatherer), suppress(_SeenEnoughError):
                runner.forward_with(block, stream, number, span, weights or {})
            if number == 0:
                gatherer.end_first_batch()
    return gatherer.finish()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _expert_leader(name: str, names: dict[str, int]) -> str | None:
    """The gate and up projections of one expert share their input, also when no token has shown it yet."""
    leader = name.removesuffix(".up_proj") + ".gate_proj"
    return leader if name.endswith(".up_proj") and ".experts." in name and leader in names else None


@contextmanager
def inputs_hooked(modules: dict[str, nn.Module], hook: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``hook(name, x)`` before each module runs on ``x``."""

    def before(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: hook(name, args[0].detach())

    handles = [module.register_forward_pre_hook(before(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
