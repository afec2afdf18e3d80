"""What makes the input of linear layers, up to a factor for every channel: found by numbers, not by names.

A norm, or a linear layer of the same block, is a producer of an input when multiplying its channels by powers of two
multiplies the input by just these, and dividing the columns of the readers by the same leaves the block's output as it
was. Both are tried out on one batch. So a norm that feeds something else as well (a router) is none, and what lies
between a producer and the input (the average over values in attention, a product, a rectifier) need not be known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.engine.forward import BlockRunner, Stream
from compressor.engine.skeleton import Linear

NEAREST = 4
"""So many modules that run before the readers are tried as producers, the last one first."""

DIGIT = 32
"""Which channel an input comes from is asked in digits of this base."""

Form = Literal["norm", "offset norm", "linear"]


@dataclass(frozen=True)
class Producer:
    """What makes an input.

    Attributes:
        module: path in the model.
        form: ``norm`` multiplies by its weight, ``offset norm`` by 1 + weight; each output of a ``linear`` is a row.
        first: the first of its channels that count; those of the input come from there on.
        channels: how many of them.
    """

    module: str
    form: Form
    first: int
    channels: int

    def scaled(self, weight: Tensor, bias: Tensor | None, factors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight (for a linear (out, in)) and bias with the channels multiplied by ``factors`` (channels,).

        In fp64 for a norm with offset, and rounded to the dtype of what is given.
        """
        part = slice(self.first, self.first + self.channels)
        weight = weight.clone()
        if self.form == "offset norm":
            weight[part] = ((1 + weight[part].double()) * factors.double() - 1).to(weight.dtype)
        else:
            weight[part] *= (factors if weight.ndim == 1 else factors[:, None]).to(weight.dtype)
        if bias is not None:
            bias = bias.clone()
            bias[part] *= factors.to(bias.dtype)
        return weight, bias


@dataclass(frozen=True)
class Fold:
    """An input whose channels can be scaled.

    Attributes:
        readers: the linears that read it.
        source: (n,) int64: input j comes from channel ``producer.first + source[j]``.
    """

    readers: tuple[Linear, ...]
    producer: Producer
    source: Tensor


@dataclass
class _Seen:
    """One pass through a block: its output, the inputs of the watched linears, and the modules in order of calls."""

    output: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


@torch.no_grad()
def find_folds(
    runner: BlockRunner, block: int, stream: Stream, shared: Sequence[Sequence[Linear]], linears: Sequence[Linear]
) -> list[Fold]:
    """Return what can be folded in a loaded block, at most one producer for each input.

    Args:
        stream: its first batch is what is tried out.
        shared: groups of linears that read the same input.
        linears: those that may become producers.
    """
    probe = _Probe(runner, block, stream, linears)
    plain = probe.run({}, shared)
    families: dict[tuple[str, ...], list[list[_Guess]]] = {}
    for readers in shared:
        guesses = list(probe.guesses(tuple(readers), plain))
        if guesses:
            families.setdefault(tuple(linear.kind for linear in readers), []).append(guesses)
    found: list[Fold] = []
    tried = [probe.settle([guesses[0] for guesses in family], plain) for family in families.values()]
    if all(tried) and probe.holds(together := [fold for folds in tried for fold in folds or ()], plain):
        return together
    for family in families.values():
        for number in range(max(map(len, family))):
            folds = probe.settle([guesses[number] for guesses in family if number < len(guesses)], plain)
            if folds and probe.holds(folds, plain):
                found += folds
                break
    return found if probe.holds(found, plain) else []


@dataclass(frozen=True)
class _Guess:
    readers: tuple[Linear, ...]
    producer: Producer


class _Probe:
    """Runs one batch through a block with scaled producers and readers."""

    def __init__(self, runner: BlockRunner, block: int, stream: Stream, linears: Sequence[Linear]) -> None:
        self.runner, self.block, self.stream = runner, block, stream
        self.number, self.span = next(stream.batches())
        self.modules = dict(runner.skeleton.blocks[block].named_modules(prefix=runner.skeleton.block_names[block]))
        self.linears = {linear.name: linear for linear in linears}
        tied = {*runner.skeleton.tied, *runner.skeleton.tied.values()}
        self.norms = {
            name: own["weight"].numel()
            for name, module in self.modules.items()
            if name not in self.linears
            and "weight" in (own := dict(module.named_parameters(recurse=False)))
            and own.keys() <= {"weight", "bias"}
            and all(tensor.ndim == 1 for tensor in own.values())
            and not any(f"{name}.{leaf}" in tied for leaf in own)
        }

    def run(self, values: Mapping[str, Tensor], shared: Sequence[Sequence[Linear]]) -> _Seen:
        """Run with other tensors, and look at the input of the first of each of the ``shared``."""
        seen = _Seen(torch.empty(0))
        watched = {readers[0].name for readers in shared}
        hooked = {name: self.modules[name] for name in {*watched, *self.linears, *self.norms}}
        with _watching(hooked, watched, seen):
            out = self.runner.forward_with(self.block, self.stream, self.number, self.span, dict(values))
        seen.output = out
        return seen

    def guesses(self, readers: tuple[Linear, ...], plain: _Seen) -> Iterator[_Guess]:
        """Yield what might make an input: modules that run before its readers, nearest first, of a fitting width."""
        n = readers[0].shape[1]
        if readers[0].name not in plain.inputs or plain.order.count(readers[0].name) != 1:
            return
        before = plain.order[: min(plain.order.index(r.name) for r in readers if r.name in plain.order)]
        nearest = [name for name in dict.fromkeys(reversed(before)) if before.count(name) == 1]
        fitting = [name for name in nearest if self.norms.get(name) == n or self._widths(name, n)]
        for name in fitting[:NEAREST]:
            if name in self.norms:
                yield _Guess(readers, Producer(name, "norm", 0, n))
                yield _Guess(readers, Producer(name, "offset norm", 0, n))
            for width in self._widths(name, n):
                yield _Guess(readers, Producer(name, "linear", self.linears[name].shape[0] - width, width))

    def _widths(self, name: str, n: int) -> list[int]:
        """How many of the last rows of a linear may make an input of ``n``: all, or as many (fused matrices end with
        what is multiplied, or averaged), or a part of as many that several heads share."""
        rows = self.linears[name].shape[0] if name in self.linears else 0
        if 0 < rows <= n:
            return [rows] if n % rows == 0 else []
        return [n // share for share in (1, 2, 4, 8) if n % share == 0] if rows else []

    def settle(self, guesses: Sequence[_Guess], plain: _Seen) -> list[Fold] | None:
        """Return the guesses with the channel that each input comes from; None if a producer does not make it so."""
        if len({guess.producer.module for guess in guesses}) < len(guesses):
            return None
        folds = []
        for guess in guesses:
            n = guess.readers[0].shape[1]
            source = torch.arange(n) if guess.producer.channels == n else self._source(guess, plain)
            if source is None:
                return None
            folds.append(Fold(guess.readers, guess.producer, source))
        return folds

    def _source(self, guess: _Guess, plain: _Seen) -> Tensor | None:
        """Ask every input for the number of its channel, digit by digit, by how much it grows with a digit of it."""
        x = plain.inputs[guess.readers[0].name].double()
        power = x.square().sum(0)
        if not bool((power > 0).all()):
            return None
        numbers = torch.arange(guess.producer.channels)
        source, place = torch.zeros(x.shape[1]), 1
        while place < len(numbers):
            factors = 1 + (numbers // place % DIGIT) / DIGIT
            values = self._scale_producer({}, guess.producer, factors.to(self.runner.device))
            y = self.run(values, [guess.readers]).inputs[guess.readers[0].name].double()
            if y.shape != x.shape:
                return None
            ratio = (x * y).sum(0) / power
            source += place * ((ratio - 1) * DIGIT).round().cpu()
            place *= DIGIT
        known = bool(((source >= 0) & (source < len(numbers))).all())
        return source.long() if known and len(set(source.tolist())) == len(numbers) else None

    def holds(self, folds: Sequence[Fold], plain: _Seen) -> bool:
        """Whether scaling leaves the block's output as it was, and makes of every input what it should."""
        values: dict[str, Tensor] = {}
        expected: dict[str, Tensor] = {}
        for number, fold in enumerate(folds):
            factors = _powers(fold.producer.channels, number).to(self.runner.device)
            values |= self._scale_producer(values, fold.producer, factors)
            spread = factors[fold.source.to(factors.device)]
            for linear in fold.readers:
                name = f"{linear.name}.weight"
                weight = self._value(values, name)
                divisor = spread.to(weight.dtype)
                values[name] = weight / (divisor[:, None] if linear.transposed else divisor)
            expected[fold.readers[0].name] = plain.inputs[fold.readers[0].name] * spread.to(plain.output.dtype)
        seen = self.run(values, [fold.readers for fold in folds])
        return _close(seen.output, plain.output) and all(
            name in seen.inputs and _close(seen.inputs[name], x) for name, x in expected.items()
        )

    def _value(self, values: Mapping[str, Tensor], name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        own: Tensor = getattr(self.modules[path], leaf)
        return values.get(name, own)

    def _scale_producer(self, values: Mapping[str, Tensor], producer: Producer, factors: Tensor) -> dict[str, Tensor]:
        name = f"{producer.module}.weight"
        transposed = producer.module in self.linears and self.linears[producer.module].transposed
        weight = self._value(values, name)
        has_bias = getattr(self.modules[producer.module], "bias", None) is not None
        bias = self._value(values, f"{producer.module}.bias") if has_bias else None
        weight, bias = producer.scaled(weight.T if transposed else weight, bias, factors)
        scaled = {name: weight.T if transposed else weight}
        return scaled if bias is None else {**scaled, f"{producer.module}.bias": bias}


def _powers(count: int, seed: int) -> Tensor:
    """Return (count,) powers of two that are as if drawn by chance: no order of channels but the right one fits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp2(torch.randint(-2, 3, (count,), generator=generator).float())


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two results (..., channels) are the same up to rounding, channel by channel."""
    if a.shape != b.shape:
        return False
    a, b = a.reshape(-1, a.shape[-1]).float(), b.reshape(-1, b.shape[-1]).float()
    tolerance = 32 * torch.finfo(torch.float32).eps * b.abs().amax(0)
    return bool(((a - b).abs().amax(0) <= tolerance).all())


@contextmanager
def _watching(modules: Mapping[str, nn.Module], inputs: set[str], seen: _Seen) -> Iterator[None]:
    """Note the order in which ``modules`` run, and what enters those of ``inputs``."""

    def before(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.order.append(name)
            if name in inputs:
                seen.inputs.setdefault(name, args[0].detach().reshape(-1, args[0].shape[-1]))

        return note

    handles = [module.register_forward_pre_hook(before(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
