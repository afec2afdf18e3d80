"""Measuring loaded models against each other: what they hold, what a step reads, and how long it takes."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from compressor.engine.limits import available_memory
from compressor.hf.caches import read_on
from compressor.hf.decoding import quicken
from compressor.hf.embedding import TiedHead, is_packed_embedding
from compressor.hf.linear import PackedLinear
from compressor.kernels.matrix import Kind, Matrix, aligned
from compressor.kernels.native import LEVELS, native
from compressor.report.schema_bench import Bandwidth, BenchDecode, BenchPrefill
from compressor.run.proof_speed import cache_bytes

WARM = 2  # steps that are not timed: the first after a prefill pays for it
REPEATS, LONG = 3, 5.0  # readings of a prompt; once is enough where all of them take more seconds than this
PASSES, PASSED = 9, 1 << 29  # over memory: passes, and bytes


@dataclass(eq=False)
class Contestant:
    """A loaded model that reads, and the cache of what it has read.

    Attributes:
        following: (batch, 1) int64, the likeliest next tokens.
    """

    model: Any
    device: torch.device
    cache: Any = None
    following: Tensor | None = None
    prefill: list[BenchPrefill] = field(default_factory=list)
    decode: list[BenchDecode] = field(default_factory=list)

    def read(self, ids: Tensor) -> float:
        """Read tokens (batch, T) and choose the next ones; return the seconds that took."""
        since = time.perf_counter()
        out, self.cache = read_on(self.model, self.cache, input_ids=ids, logits_to_keep=1)
        self.following = out.logits[:, -1:].argmax(-1)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - since

    def begin(self, ids: Tensor) -> float:
        """`read` as the first tokens of a text."""
        self.cache = None
        return self.read(ids)

    def step(self) -> float:
        """`read` the tokens that were chosen."""
        assert self.following is not None
        return self.read(self.following)


@torch.no_grad()
def measure_cell(entries: Sequence[Contestant], ids: Tensor, context: int, steps: int, bandwidth: float) -> None:
    """Time one context and batch; the models take turns at every prompt and at every token. Adds a row to each.

    Args:
        entries: the measured model first.
        ids: (batch, context), or (batch, 1) for a context of 0: the token that a text begins with.
        context: tokens before the first one that is timed; 0: no prompt is timed either.
        steps: tokens to time.
        bandwidth: bytes per second of plain reading.
    """
    batch = len(ids)
    if context:
        rounds = [[entry.begin(ids) for entry in entries]]  # the first also allocates
        while len(rounds) < (1 + REPEATS if sum(rounds[0]) < LONG else 1):
            rounds.append([entry.begin(ids) for entry in entries])
        times = _medians(rounds[1:] or rounds)
        for entry, seconds in zip(entries, times, strict=True):
            faster = None if entry is entries[0] else seconds / times[0]
            row = BenchPrefill(
                prompt=context, batch=batch, seconds=seconds, tokens_per_second=context * batch / seconds,
                speedup=faster,
            )  # fmt: skip
            entry.prefill.append(row)
    else:
        for entry in entries:
            entry.begin(ids)
    for _ in range(WARM):
        for entry in entries:
            entry.step()
    caches = [cache_bytes(entry.cache) for entry in entries]
    times = _medians([[entry.step() for entry in entries] for _ in range(steps)])
    caches = [(was + cache_bytes(entry.cache)) // 2 for was, entry in zip(caches, entries, strict=True)]
    for entry, seconds, cached in zip(entries, times, caches, strict=True):
        with _calls(entry.model) as called:
            entry.step()
        weights = sum(bytes_read(module, batch, entry.model.config) for module in called)
        speed = (weights + cached) / seconds
        row_ = BenchDecode(
            context=context, batch=batch, seconds=seconds, tokens_per_second=batch / seconds,
            weight_bytes=weights, cache_bytes=cached, bytes_per_second=speed, bandwidth_fraction=speed / bandwidth,
            speedup=None if entry is entries[0] else seconds / times[0],
        )  # fmt: skip
        entry.decode.append(row_)
        entry.cache = None


def _medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [median(column) for column in zip(*rounds, strict=True)]


class _calls:  # noqa: N801  # reads as a function
    """Within, lists the modules of a model that are called."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.found = model, dict[nn.Module, None]()

    def __enter__(self) -> dict[nn.Module, None]:
        def note(module: nn.Module, _: Any) -> None:
            self.found[module] = None

        self.hooks = [module.register_forward_pre_hook(note) for module in self.model.modules()]
        return self.found

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def bytes_read(module: nn.Module, batch: int, config: Any) -> int:
    """Bytes of its own weights that a module reads when it is called for one token in each row of a batch.

    Of an embedding the rows that are asked for; of fused experts those that are routed to, were they all different.
    """
    product = getattr(getattr(module, "fast", None), "product", None)
    if product is not None:
        either = getattr(product, "read_nbytes", None)  # of two forms of the matrix, one
        read = product.nbytes if either is None else either(batch)
        return int(read) + sum(part.nbytes for part in module.parameters(recurse=False))
    if isinstance(module, PackedLinear):
        return sum(part.nbytes for part in (*module.parts.values(), *module.parameters(recurse=False)))
    if isinstance(module, TiedHead):
        embedding: Any = module._shared[0]
        return sum(part.nbytes for part in (*embedding.parts.values(), *module.parameters(recurse=False)))
    if isinstance(module, nn.Embedding):
        stored = _stored(module)
        return min(batch, module.num_embeddings) * sum(part.nbytes for part in stored) // module.num_embeddings
    total = 0
    for part in module.parameters(recurse=False):
        routed = getattr(config.get_text_config(), "num_experts_per_tok", None)
        share = min(1.0, batch * routed / len(part)) if part.ndim == 3 and routed else 1.0
        total += int(part.nbytes * share)
    return total


def _stored(module: nn.Module) -> Iterator[Tensor]:
    """The weights of a module itself as tensors: parameters, and packed parts that it holds."""
    yield from module.parameters(recurse=False)
    if isinstance(module, PackedLinear) or is_packed_embedding(module):
        yield from (part for name, part in module.named_buffers(recurse=False) if name.startswith("weight_"))


def _laid_out(module: nn.Module) -> Iterator[Tensor]:
    """The tensors of a module's layout, and of the one that it shares with others."""
    fast = getattr(module, "fast", None)
    if fast is not None:
        yield from _tensors(fast.product)
        if getattr(fast, "group", None) is not None:
            yield from _tensors(fast.group[0].whole)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for entry in dataclasses.fields(value):
            yield from _tensors(getattr(value, entry.name))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def held_bytes(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of memory that the weights of a model take, and those of them that are layouts of kernels.

    What several tensors share counts once.
    """
    modules = list(model.modules())
    layouts = [tensor for module in modules for tensor in _laid_out(module)]
    hidden = sum(getattr(getattr(getattr(each, "fast", None), "product", None), "hidden_nbytes", 0) for each in modules)
    held = _covered(chain(layouts, *(_stored(module) for module in modules)))
    return held + hidden, _covered(layouts) + hidden


def _covered(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory that lie in one of some tensors, at least."""
    spans = sorted({(each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors if each.nbytes})
    total, reached = 0, 0
    for first, last in spans:
        total += max(0, last - max(first, reached))
        reached = max(reached, last)
    return total


def products(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Count the linear layers of a model by how they are multiplied, and the reasons why not otherwise."""
    ways: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for module in model.modules():
        fast = getattr(module, "fast", None)
        if isinstance(module, (PackedLinear, TiedHead)):
            ways[fast.rung if fast is not None else "unpacking"] += 1
            if fast is not None and fast.reason:
                reasons[fast.reason] += 1
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            own = getattr(vars(module).get("forward"), "func", None) is _multiply
            ways["our bf16 product" if own else "torch"] += 1
    return dict(ways), dict(reasons)


def with_our_product(model: Any, level: str) -> Any:
    """Return a copy of a model in bf16 that shares its tensors, but multiplies by the bf16 product of the kernels.

    That one reads a matrix as fast as memory gives it, and so does the attention of a token, so that nothing is held
    against slow parts of PyTorch.

    Args:
        level: instruction set.
    """
    shared: dict[int, Any] = {id(each): each for each in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared)
    for module in twin.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            weight = aligned(module.weight.detach())
            matrix = Matrix(Kind.DENSE_BF16, weight.shape[0], weight.shape[1], 128, 1.0, weight)
            bias = None if module.bias is None else module.bias.detach().float()
            module.forward = partial(_multiply, matrix, bias, level)  # type: ignore[method-assign]
    quicken(twin, level)
    return twin


def _multiply(matrix: Matrix, bias: Tensor | None, level: str, x: Tensor) -> Tensor:
    y = matrix.product(x.reshape(-1, x.shape[-1]), bias, level, False)
    return y.view(*x.shape[:-1], y.shape[-1])


def measure_bandwidth(device: torch.device) -> Bandwidth:
    """Time plain reading of memory that no cache holds: by the kernels where there are any, else a copy by PyTorch."""
    found = native() if device.type == "cpu" else None
    room = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    size = min(PASSED, room // 4)
    data = torch.zeros(size, dtype=torch.uint8, device=device)
    other = None if found is not None else torch.zeros_like(data)
    times = []
    for _ in range(PASSES):
        since = time.perf_counter()
        if found is not None:
            found.module.read_memory(data.data_ptr(), size, torch.get_num_threads(), found.best)
        else:
            assert other is not None
            other.copy_(data)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        times.append(time.perf_counter() - since)
    moved = size if found is not None else 2 * size
    how = f"reading by the {LEVELS[found.best]} kernels" if found is not None else "a copy by torch, read and written"
    return Bandwidth(bytes_per_second=moved / min(times), how=how, bytes=size)
