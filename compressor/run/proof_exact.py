"""Proofs that a linearized model computes what it should, however it is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressor.hf.caches import read_on
from compressor.report.schema_linear import Agreement, Exactness
from compressor.run.proof_models import device_of, greedy, logits_of, mixer_of, rounding, window_of


@torch.no_grad()
def exactness(teacher: Any, student: Any, ids: Tensor, *, texts: int = 4) -> Exactness:
    """Compare on texts that fit the window.

    Where training has changed weights that the teacher has too, the student cannot give the teacher's logits. What its
    layers must give even then is what softmax attention gives with the student's weights: those are run through the
    teacher's layers.

    Args:
        ids: (windows, T) int64 token ids.
        texts: windows used.
    """
    spec = mixer_of(student)
    short = ids[:texts, : window_of(student)]
    ours = logits_of(student, short).cpu()
    softmax = softmax_logits(teacher, student, short)
    allowed = rounding(student, ours)
    exact = spec is not None and spec.exact
    to_teacher = float((ours - logits_of(teacher, short).cpu()).abs().max())
    to_softmax = None if softmax is None else float((ours - softmax.cpu()).abs().max())
    return Exactness(
        by_construction=exact,
        tokens=short.shape[1],
        texts=short.shape[0],
        to_teacher=to_teacher,
        to_softmax=to_softmax,
        allowed=allowed,
        passed=to_softmax <= allowed if exact and to_softmax is not None else None,
    )


def softmax_logits(teacher: Any, student: Any, ids: Tensor) -> Tensor | None:
    """Return logits (B, T, vocabulary) of softmax attention with the student's weights; nothing is copied.

    None where the two do not have the same weights: the student's are packed, or elsewhere.
    """
    own = dict(student.named_parameters())
    wanted = dict(teacher.named_parameters())
    if any(name not in own or own[name].shape != tensor.shape for name, tensor in wanted.items()):
        return None
    if any(own[name].device != tensor.device for name, tensor in wanted.items()):
        return None
    inputs = {"input_ids": ids.to(device_of(teacher)), "use_cache": False}
    logits: Tensor = torch.func.functional_call(teacher, {name: own[name] for name in wanted}, (), inputs).logits
    return logits.float()


@torch.no_grad()
def agreement(
    student: Any, ids: Tensor, *, rows: int = 2, tokens: int | None = None, steps: int = 24, chunk: int | None = None
) -> list[Agreement]:
    """Compute the same logits in several ways; the differences must be rounding.

    Args:
        ids: (windows, T) int64 token ids.
        rows: windows used.
        tokens: of each; four windows and a few by default, as far as there are so many.
        steps: tokens that are decoded one by one, and that are generated.
        chunk: tokens at once in a chunked prefill; about two thirds of a window by default.
    """
    window = window_of(student)
    length = min(tokens or 4 * window + 7, ids.shape[1])
    texts = ids[:rows, :length]
    steps = min(steps, length // 2)
    chunk = chunk or max(2, 2 * window // 3 + 1)
    whole = logits_of(student, texts).cpu()
    allowed = rounding(student, whole)
    in_chunks = list(range(0, length, chunk))
    one_by_one = [0, *range(length - steps, length)]
    found = {
        "read at once, then token by token": _difference(cached_logits(student, texts, one_by_one), whole),
        f"read in chunks of {chunk}": _difference(cached_logits(student, texts, in_chunks), whole),
        "in a batch with padding on the left": _padded_difference(student, texts, whole),
    }
    rowed = [
        Agreement(way=way, tokens=texts.numel(), difference=worst, allowed=allowed, passed=worst <= allowed)
        for way, worst in found.items()
    ]
    worst, compared = _generated_difference(student, texts[:, : length - steps], steps)
    way = "generated greedily, with padding on the left"
    return [*rowed, Agreement(way=way, tokens=compared, difference=worst, allowed=allowed, passed=worst <= allowed)]


def cached_logits(model: Any, ids: Tensor, starts: list[int]) -> Tensor:
    """Return fp32 logits (B, T, vocabulary) on the CPU of a text that is read piece by piece through a cache.

    Args:
        ids: (B, T).
        starts: where each piece begins; the first at 0.
    """
    cache, out = None, []
    ids = ids.to(device_of(model))
    for start, stop in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
        given, cache = read_on(model, cache, input_ids=ids[:, start:stop])
        out.append(given.logits.float().cpu())
    return torch.cat(out, 1)


def _difference(ours: Tensor, reference: Tensor) -> float:
    worst = float((ours - reference).abs().max())
    return worst if worst == worst else float("inf")


def pad_left(ids: Tensor, cut: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and positions (B, T) of texts of which row r lacks its last ``cut[r]`` tokens."""
    T = ids.shape[1]
    padded = torch.stack([torch.cat([row.new_zeros(n), row[: T - n]]) for row, n in zip(ids, cut, strict=True)])
    mask = torch.stack([torch.arange(T) >= n for n in cut]).long()
    return padded, mask, (mask.cumsum(1) - 1).clamp_min(0)


def _padded_difference(student: Any, texts: Tensor, whole: Tensor) -> float:
    """Row r has r times a third of the text as padding; what is left must not notice."""
    T = texts.shape[1]
    cut = [row * T // (3 * max(1, len(texts) - 1)) for row in range(len(texts))] if len(texts) > 1 else [T // 3]
    ids, mask, places = pad_left(texts, cut)
    device = device_of(student)
    logits = logits_of(student, ids, attention_mask=mask.to(device), position_ids=places.to(device)).cpu()
    return max(_difference(logits[row, n:], whole[row, : T - n]) for row, n in enumerate(cut))


def _generated_difference(student: Any, prompts: Tensor, steps: int) -> tuple[float, int]:
    """How much better than a generated token another one would have been, in one pass over the whole text."""
    T = prompts.shape[1]
    cut = [row * (T // 4) for row in range(len(prompts))]
    ids, mask, _ = pad_left(prompts, cut)
    generated = greedy(student, ids, steps, mask=mask)
    worst = 0.0
    for row, n in enumerate(cut):
        text = torch.cat([prompts[row, : T - n], generated[row]])[None]
        logits = logits_of(student, text)[0, T - n - 1 : -1].cpu()
        chosen = logits.gather(-1, generated[row][:, None])[:, 0]
        worst = max(worst, float((logits.amax(-1) - chosen).max()))
    return worst, generated.numel()
