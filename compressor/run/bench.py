"""How fast a model is: against memory bandwidth, and against the model it was made from, in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compressor
from compressor.engine.checkpoint import EMBEDDED, open_checkpoint, resolve_model
from compressor.engine.hub import find_cached
from compressor.engine.hub_names import parse_name
from compressor.engine.limits import available_memory, peak_device_memory, peak_memory
from compressor.engine.skeleton import Skeleton, build_skeleton
from compressor.errors import UserError
from compressor.kernels.layers import exact_activations
from compressor.kernels.native import LEVELS, native, rung_and_why
from compressor.report.files import REPORT, read_report
from compressor.report.schema_bench import Bench, BenchWay
from compressor.run.bench_measure import (
    WARM,
    Contestant,
    held_bytes,
    measure_bandwidth,
    measure_cell,
    products,
    with_our_product,
)
from compressor.run.finish import machine, utc_now, versions
from compressor.run.plan import choose_device, choose_dtype, context_length
from compressor.run.progress import Voice, quiet, without_bars

CONTEXTS = (0, 512, 2048)
"""Where to measure unless told otherwise, as far as they fit the model."""


@dataclass(frozen=True)
class _Model:
    """A model that is to be measured: its headers, and what it is called."""

    name: str
    skeleton: Skeleton

    @property
    def folder(self) -> Path:
        return self.skeleton.checkpoint.folder

    @property
    def dtype(self) -> torch.dtype:
        """In which its linear layers are stored, or were before they were packed."""
        return self.skeleton.linears[0].dtype

    @property
    def vocabulary(self) -> int:
        return int(self.skeleton.config.get_text_config().vocab_size)


@torch.no_grad()
def bench(
    model: str,
    *,
    base: str | None = None,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] = (1,),
    steps: int = 32,
    threads: int | None = None,
    dtype: str = "stored",
    device: str = "auto",
    trust_remote_code: bool = False,
    command: str = "",
    voice: Voice | None = None,
) -> Bench:
    """Measure a model, and the one it was made from beside it: loading, prompts, single tokens, memory.

    Greedy decoding with a cache of keys and values, on random tokens. The base is measured in its own dtype, in bf16
    where that is another one, and in bf16 by the good product of the kernels. The models take turns at every token.

    Args:
        model: folder, hub id, or 'embedded'.
        base: model to hold it against; by default the one that its report names, if that is at hand.
        contexts: tokens that stand before the timed ones; by default those of `CONTEXTS` that fit.
        batches: rows that are computed together.
        steps: tokens timed in each place; the median counts.
        threads: for PyTorch and kernels; by default as many as PyTorch takes. It takes as many as before afterwards.
        dtype: of the model: stored, float32, bfloat16 or float16.
        device: where both are measured: auto (a GPU where there is one), cpu, cuda, ...
        trust_remote_code: run code that the folders of either bring along.
        command: what was typed, for the result.
        voice: how to speak; by default nothing but warnings, on standard error.

    Returns:
        Times in seconds and sizes in bytes, a row for every way in which either was computed; ``notes`` say what was
        left out and what disturbed the clock.

    Raises:
        UserError: unknown model, device or dtype; contexts beyond the model's; a base that has other tokens; not
            enough memory.
    """
    began, started, voice = time.perf_counter(), utc_now(), voice or quiet()
    rung, why = rung_and_why()
    activations = "exact" if exact_activations() else "int8"
    place = choose_device(device)
    ours = _open(model, trust_remote_code)
    chosen = ours.dtype if dtype == "stored" else choose_dtype(dtype, place, ours.dtype)
    rival, notes = _find_base(base, ours, trust_remote_code)
    lengths = _fitting(contexts, steps, [ours, *([rival] if rival else [])])
    _check_numbers(batches, steps, threads)
    if notes and (ours.folder / REPORT).is_file():  # it has a base, and this may take long
        voice.warn(notes[0])
    notes += _busy()
    narrow = _check_memory(ours, rival)
    notes += [narrow] if narrow else []
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        cells = [(context, batch) for batch in batches for context in lengths]
        with voice.progress(len(cells) + 2) as ticker, without_bars():  # some layers are unpacked when first used
            ticker.now(f"loading {ours.name}")
            first = _load(ours, "model", chosen, place, trust_remote_code)
            first.measured.begin(_ids(max(1, lengths[-1]), max(batches), ours.vocabulary, place))
            first.measured.step()
            first.measured.cache = None
            peaks = peak_memory(), peak_device_memory(place)
            bandwidth = measure_bandwidth(place)  # not before: it takes memory
            ticker.advance()
            loaded = [first]
            if rival is not None:
                ticker.now(f"loading {rival.name}")
                loaded += _load_base(rival, place, rung, trust_remote_code, notes, only_bf16=bool(narrow))
            ticker.advance()
            for context, batch in cells:
                ticker.now(f"context {context}, batch {batch}")
                ids = _ids(max(1, context), batch, ours.vocabulary, place)
                entries = [each.measured for each in loaded]
                measure_cell(entries, ids, context, steps, bandwidth.bytes_per_second)
                ticker.advance()
        threads_used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    return Bench(
        version=compressor.__version__,
        command=command,
        started=started,
        model=ours.name,
        architecture=type(ours.skeleton.model).__name__,
        parameters=ours.skeleton.parameters(),
        disk_bytes=ours.skeleton.checkpoint.disk_bytes,
        base=rival.name if rival is not None else None,
        notes=notes,
        device=str(place),
        threads=threads_used,
        rung=rung,
        rung_reason=why,
        activations="exact" if activations == "exact" else "int8",
        steps=steps,
        bandwidth=bandwidth,
        peak_rss_bytes=peaks[0],
        peak_device_bytes=peaks[1],
        ways=[each.finished() for each in loaded],
        machine=machine(),
        versions=versions(),
        seconds=time.perf_counter() - began,
    )


def _open(name: str, trust_remote_code: bool) -> _Model:
    folder = resolve_model(name)
    skeleton = build_skeleton(open_checkpoint(folder), trust_remote_code=trust_remote_code)
    return _Model(folder.name if Path(name).expanduser().exists() else name, skeleton)


def _find_base(asked: str | None, ours: _Model, trust_remote_code: bool) -> tuple[_Model | None, list[str]]:
    """The model to hold it against, or a line that says why there is none."""
    if asked is None:
        name, why = default_base(ours.folder)
        if name is None:
            return None, [f"not held against a base: {why}"]
    else:
        name = asked
    try:
        found = _open(name, trust_remote_code)
        if found.vocabulary != ours.vocabulary:
            raise UserError(
                f"{name} has {found.vocabulary} tokens, {ours.name} has {ours.vocabulary}",
                fix="--base takes the model it was made from",
            )
    except UserError as error:
        if asked is not None:
            raise
        return None, [f"not held against a base: {error}"]
    return found, []


def default_base(folder: Path) -> tuple[str | None, str]:
    """Return the model that a folder's report names as its source, if it is on this machine; else None and why not.

    A report names local folders without their path: they are looked for beside the folder, and here.
    """
    try:
        made_from = read_report(folder).model
    except UserError:
        return None, "no report says what it was made from; --base does"
    source = made_from.source
    if source == EMBEDDED:
        return source, ""
    for place in (folder.parent / source, Path(source)):
        if (place / "config.json").is_file() and place.resolve() != folder:
            return str(place), ""
    if (model := parse_name(source, made_from.revision)) is not None:
        if (cached := find_cached(model)) is not None:
            return str(cached), ""
        return None, f"{model}, from which it was made, was not downloaded yet; --base {model} does so"
    return None, f"{source}, from which it was made, is neither beside it nor here; --base FOLDER says where it is"


def _fitting(asked: Sequence[int] | None, steps: int, models: Sequence[_Model]) -> list[int]:
    """Contexts to measure, ascending.

    Raises:
        UserError: one that was asked for is negative or beyond a model's, or none fits.
    """
    known = [length for each in models if (length := context_length(each.skeleton.config)) is not None]
    room = min(known) - steps - WARM - 1 if known else None
    fit = sorted(set(asked)) if asked is not None else _usual(room)
    if fit and fit[0] < 0:
        raise UserError(f"a context of {fit[0]} tokens: expected 0 or more", fix="--context 0,512")
    if not fit or (room is not None and fit[-1] > room):
        beyond = fit[-1] if fit else 0
        raise UserError(
            f"a context of {beyond} tokens and {steps + WARM + 1} more do not fit the model's context of {min(known)}",
            fix=f"--context {room}" if room is not None and room >= 0 else "fewer --tokens",
        )
    return fit


def _usual(room: int | None) -> list[int]:
    """The usual contexts that fit, and the largest that does where the next one is far."""
    if room is None:
        return list(CONTEXTS)
    fit = [context for context in CONTEXTS if context <= room]
    return [*fit, room] if fit and fit[-1] < room // 2 and room < CONTEXTS[-1] else fit


def _check_numbers(batches: Sequence[int], steps: int, threads: int | None) -> None:
    if not batches or min(batches) < 1:
        raise UserError("a batch needs a row", fix="--batch 1")
    if steps < 1:
        raise UserError("no tokens to time", fix="--tokens 32")
    if threads is not None and threads < 1:
        raise UserError("no threads to compute with", fix="--threads 1")


def _check_memory(ours: _Model, rival: _Model | None) -> str | None:
    """Refuse a model that does not fit; say so where the base does not in both dtypes."""
    free = available_memory()
    if ours.skeleton.checkpoint.nbytes > free:
        raise UserError(
            f"{ours.name} has {ours.skeleton.checkpoint.nbytes / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB are free"
        )
    if rival is not None and rival.dtype != torch.bfloat16:
        both = 2 * rival.skeleton.parameters() + rival.skeleton.checkpoint.nbytes + ours.skeleton.checkpoint.nbytes
        if both > free:
            return f"{rival.name} is measured in bfloat16 only: in both dtypes it takes {both / 1e9:.1f} GB"
    return None


@dataclass(eq=False)
class _Loaded:
    """A contestant, and what is known of it before it has run."""

    name: Any
    dtype: torch.dtype
    load_seconds: float | None
    measured: Contestant

    def finished(self) -> BenchWay:
        """What was measured, and what it holds now: some layers are made ready when they first run."""
        held, layouts = held_bytes(self.measured.model)
        ways, reasons = products(self.measured.model)
        return BenchWay(
            name=self.name,
            dtype=str(self.dtype).removeprefix("torch."),
            products=ways,
            reasons=reasons,
            load_seconds=self.load_seconds,
            held_bytes=held,
            layout_bytes=layouts,
            prefill=self.measured.prefill,
            decode=self.measured.decode,
        )


def _load(model: _Model, who: Any, dtype: torch.dtype, device: torch.device, trust: bool) -> _Loaded:
    from transformers import AutoModelForCausalLM

    since = time.perf_counter()
    network = AutoModelForCausalLM.from_pretrained(model.folder, dtype=dtype, trust_remote_code=trust)
    network = network.to(device).eval()
    return _Loaded(who, dtype, time.perf_counter() - since, Contestant(network, device))


def _load_base(
    base: _Model, device: torch.device, rung: str, trust: bool, notes: list[str], *, only_bf16: bool
) -> list[_Loaded]:
    """The base in its dtype, in bf16, and in bf16 with our product; as many of them as there are and fit."""
    loaded = []
    if base.dtype == torch.bfloat16 or not only_bf16:
        loaded.append(_load(base, "base", base.dtype, device, trust))
    if base.dtype != torch.bfloat16:
        loaded.append(_load(base, "base in bfloat16", torch.bfloat16, device, trust))
    found = native()
    level = rung if rung in LEVELS else LEVELS[found.best] if found is not None and found.best else None
    if level is None or device.type != "cpu":
        reason = "there are no kernels for it" if level is None else f"the kernels are not for {device.type}"
        notes.append(f"the base's matrices by a good bf16 product: not measured, {reason}")
        return loaded
    twin = with_our_product(loaded[-1].measured.model, level)
    return [*loaded, _Loaded("base, our product", torch.bfloat16, None, Contestant(twin, device))]


def _busy() -> list[str]:
    """A note where others keep the processors busy: everything will look slower than it is."""
    load, processors = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load <= max(1.0, processors / 2):
        return []
    return [
        f"other programs were running when this began (load {load:.1f}, {processors} processors): times are too long"
    ]


def _ids(tokens: int, batch: int, vocabulary: int, device: torch.device) -> Tensor:
    """Random tokens (batch, tokens), the same every time."""
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
