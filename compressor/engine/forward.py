"""Running a model one decoder block at a time, without knowing its architecture.

The outer model (embeddings, masks, rotary tables) runs once with every block replaced by a recorder: that gives the
first
hidden states, and the arguments with which each block wants to be called. Afterwards each block is called on its own
with
exactly those arguments. At the end the outer model runs once more with the last hidden states put in place of the
blocks'
work: that gives the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compressor.engine.limits import return_memory
from compressor.engine.skeleton import Skeleton


@dataclass(frozen=True)
class BlockCall:
    """Everything but the hidden states with which the model calls a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stop(Exception):  # noqa: N818  # not an error
    """Leaves the outer model once the blocks have been reached."""


@dataclass
class Stream:
    """Hidden states of a set of token windows on their way through the blocks.

    Attributes:
        ids: (windows, length) int64.
        states: (windows, length, width) in the compute dtype, on the CPU; overwritten block by block.
        calls: batch number -> the calls of all blocks. Batches whose calls are equal share one object.
    """

    ids: Tensor
    states: Tensor
    calls: list[list[BlockCall]]
    batch: int

    def batches(self) -> Iterator[tuple[int, slice]]:
        """Number and window range of each batch."""
        for number, start in enumerate(range(0, len(self.ids), self.batch)):
            yield number, slice(start, min(start + self.batch, len(self.ids)))

    def copy(self) -> Stream:
        """The same windows with hidden states of their own."""
        return Stream(self.ids, self.states.clone(), self.calls, self.batch)


def batch_tokens(device: torch.device) -> int:
    """Tokens in a forward pass: on CPUs more would only take memory, accelerators want to be filled."""
    return 1024 if device.type == "cpu" else 8192


class BlockRunner:
    """Fills, calls and empties the blocks of a skeleton, on one device and in one compute dtype."""

    def __init__(self, skeleton: Skeleton, *, device: torch.device, dtype: torch.dtype) -> None:
        self.skeleton = skeleton
        self.device = device
        self.dtype = dtype
        self._returns_tuple: bool | None = None

    def load(self, names: list[str], values: dict[str, Tensor] | None = None) -> None:
        """Give module tensors their data: from ``values`` where named there, else from the checkpoint."""
        for name in names:
            value = values[name] if values and name in values else self.skeleton.read(name)
            self._assign(name, value.to(device=self.device, dtype=self.dtype))

    def load_outer(self) -> None:
        """Load everything outside the blocks, and move the buffers that are not stored to the device."""
        self.load(self.skeleton.outer_tensors())
        for module in self.skeleton.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(self.device)

    def with_outer(self, values: dict[str, Tensor]) -> BlockRunner:
        """A runner of the same model with other tensors outside the blocks; all the rest is shared, not copied.

        Args:
            values: module tensor name -> value.
        """
        model = self.skeleton.model
        shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        skeleton = replace(self.skeleton, model=copy.deepcopy(model, shared))
        other = BlockRunner(skeleton, device=self.device, dtype=self.dtype)
        other._returns_tuple = self._returns_tuple
        for name, value in values.items():
            other.set_weight(name, value)
        return other

    def load_block(self, block: int) -> nn.Module:
        """Load one block and return it."""
        self.load(self.skeleton.block_tensors(block))
        return self.skeleton.blocks[block]

    def release_block(self, block: int) -> None:
        """Let go of a block's data."""
        for name in self.skeleton.block_tensors(block):
            self._assign(name, torch.empty_like(self.loaded(name), device="meta"))
        return_memory()

    def set_weight(self, name: str, value: Tensor) -> None:
        """Replace a loaded tensor by one of the same shape (module layout)."""
        self._assign(name, value.to(device=self.device, dtype=self.dtype))

    def loaded(self, name: str) -> Tensor:
        """A tensor of the model as it is loaded, in the module's layout."""
        path, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self.skeleton.model.get_submodule(path), leaf)
        return tensor

    def _assign(self, name: str, value: Tensor) -> None:
        for alias in [name, *(tied for tied, first in self.skeleton.tied.items() if first == name)]:
            path, _, leaf = alias.rpartition(".")
            module = self.skeleton.model.get_submodule(path)
            if leaf in module._buffers:
                module._buffers[leaf] = value
            else:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    @torch.no_grad()
    def start(self, ids: Tensor) -> Stream:
        """Embed token windows and record how each block is called. The outer tensors must be loaded.

        Args:
            ids: (windows, length) int64.
        """
        size = max(1, batch_tokens(self.device) // ids.shape[1])
        if self._returns_tuple is None:
            self._returns_tuple = self._learn_return_type(ids[:1])
        states: list[Tensor] = []
        calls: list[list[BlockCall]] = []
        for begin in range(0, len(ids), size):
            first, recorded = self._record(ids[begin : begin + size])
            states.append(first.cpu())
            known = next((earlier for earlier in calls[:1] + calls[-1:] if _equal(earlier, recorded)), None)
            calls.append(known if known is not None else recorded)
        return Stream(ids, torch.cat(states), calls, size)

    def _record(self, ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
        blocks = self.skeleton.blocks
        recorded: dict[int, BlockCall] = {}
        entered: list[Tensor] = []

        def recorder(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, rest, named = _split(args, kwargs)
                if index == 0:
                    entered.append(hidden)
                recorded[index] = BlockCall(rest, named)
                if index == len(blocks) - 1:
                    raise _Stop  # the head would make (windows, length, vocabulary) logits for nothing
                return (hidden,) if self._returns_tuple else hidden

            return forward

        with replaced_forwards(blocks, [recorder(i) for i in range(len(blocks))]), suppress(_Stop):
            self.skeleton.model(input_ids=ids.to(self.device), use_cache=False)
        return entered[0], [recorded[i] for i in range(len(blocks))]

    def _learn_return_type(self, ids: Tensor) -> bool:
        """Whether blocks return tuples: found by running the first one on one window."""
        caught: list[tuple[Tensor, BlockCall]] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            hidden, rest, named = _split(args, kwargs)
            caught.append((hidden, BlockCall(rest, named)))
            raise _Stop

        with replaced_forwards(self.skeleton.blocks[:1], [stop]), suppress(_Stop):
            self.skeleton.model(input_ids=ids.to(self.device), use_cache=False)
        hidden, call = caught[0]
        block = self.load_block(0)
        out = block(hidden, *call.args, **call.kwargs)
        self.release_block(0)
        return not isinstance(out, Tensor)

    @torch.no_grad()
    def forward(self, block: int, stream: Stream, number: int, span: slice) -> Tensor:
        """Hidden states of one batch behind a loaded block, on the device."""
        return self.forward_with(block, stream, number, span, {})

    def forward_with(self, block: int, stream: Stream, number: int, span: slice, weights: dict[str, Tensor]) -> Tensor:
        """The same with other tensors in place of some of the block's, and differentiable with respect to them.

        Args:
            weights: module tensor name -> value, in the compute dtype, on the device.
        """
        return self.apply(block, stream.calls[number][block], stream.states[span].to(self.device), weights)

    def apply(self, block: int, call: BlockCall, hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Call a loaded block on ``hidden`` (windows, length, width), on the device; differentiable.

        Args:
            weights: as for :meth:`forward_with`.
        """
        prefix = self.skeleton.block_names[block] + "."
        own = {name.removeprefix(prefix): value for name, value in weights.items()}
        out = functional_call(self.skeleton.blocks[block], own, (hidden, *call.args), call.kwargs)
        out = out if isinstance(out, Tensor) else out[0]
        if out.shape != hidden.shape:
            raise RuntimeError(f"block {block} turned {tuple(hidden.shape)} into {tuple(out.shape)}")
        return out

    def step(self, block: int, stream: Stream) -> None:
        """Send a stream through a loaded block."""
        for number, span in stream.batches():
            stream.states[span] = self.forward(block, stream, number, span).cpu()

    def run(self, stream: Stream) -> None:
        """Send a stream through all blocks, one in memory at a time."""
        for block in range(len(self.skeleton.blocks)):
            self.load_block(block)
            self.step(block, stream)
            self.release_block(block)

    @torch.no_grad()
    def logits(self, stream: Stream, span: slice) -> Tensor:
        """Logits (windows, length, vocabulary) fp32 of a stream that has passed every block."""
        return self.head(stream.ids[span], stream.states[span].to(self.device))

    def head(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits (windows, length, vocabulary) fp32 from the states behind the last block; differentiable.

        Args:
            ids: (windows, length) of the same windows; only their number counts.
            hidden: (windows, length, width), on the device.
        """
        blocks = self.skeleton.blocks

        def inject(*_: Any, **__: Any) -> Any:
            return (hidden,) if self._returns_tuple else hidden

        with replaced_forwards(blocks, [inject] * len(blocks)):
            out = self.skeleton.model(input_ids=ids.to(self.device), use_cache=False)
        return out.logits.float()  # type: ignore[no-any-return]


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Part a block's hidden states from its other arguments, and drop caches: a replay must not remember."""
    named = dict(kwargs)
    hidden, rest = (args[0], args[1:]) if args else (named.pop("hidden_states"), ())
    for key in [key for key in named if "past_key_value" in key or key in ("layer_past", "cache")]:
        named[key] = None
    return hidden, rest, named


@contextmanager
def replaced_forwards(modules: list[nn.Module], forwards: list[Callable[..., Any]]) -> Iterator[None]:
    """Let modules run other forwards for a while; their other attributes stay reachable for the model."""
    for module, forward in zip(modules, forwards, strict=True):
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _equal(a: Any, b: Any) -> bool:
    """Structural equality of recorded calls, tensors compared by value."""
    if isinstance(a, BlockCall):
        return isinstance(b, BlockCall) and _equal(a.args, b.args) and _equal(a.kwargs, b.kwargs)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)))
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return bool(a is b or a == b)
