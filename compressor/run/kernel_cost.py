"""What it costs that activations are rounded to 8 bits: a model by the kernels against itself, multiplied exactly."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from compressor.errors import UserError
from compressor.hf.caches import read_on
from compressor.hf.fast import accelerate
from compressor.kernels.layers import exact_activations
from compressor.kernels.matrix import FEW
from compressor.kernels.native import LEVELS, rung_and_why
from compressor.kernels.stock import FEW_IN_8_BITS

WINDOWS = FEW  # read together, one token of each: so few that they are multiplied as one token is
FEWEST, MOST = 64, 1024  # tokens: differences of the same model on the same tokens need no more
LOGITS = 1 << 26  # numbers held of each pass
WORK = 1 << 40  # products of a weight and a token: seconds


def chosen_windows(ids: Tensor, vocabulary: int, parameters: int) -> Tensor:
    """Return the first of some windows, cut short where they would take long or much memory.

    Args:
        ids: (windows, T).

    Returns:
        (some windows, fewer tokens), at least one window.
    """
    tokens = max(FEWEST, min(MOST, LOGITS // vocabulary, WORK // parameters))
    count = min(WINDOWS, len(ids))
    return ids[:count, : tokens // count]


@torch.no_grad()
def kernel_cost(model: Any, ids: Tensor) -> dict[str, Any]:
    """Measure a model on the CPU whose packed layers unpack their matrices; afterwards they use the kernels.

    Args:
        ids: (windows, T).

    Returns:
        Fields of `KernelCost`, but its text; or ``skipped``: why nothing was measured.
    """
    since = time.perf_counter()
    try:
        way, why = rung_and_why()
        activations = "exact" if exact_activations() else "int8"
    except UserError as error:
        return {"skipped": str(error)}
    if way not in (*LEVELS, "torch"):
        return {"skipped": f"packed layers are multiplied by {way}, {why}"}
    if way == "torch":
        ids = ids[:FEW_IN_8_BITS]
    reference = model(input_ids=ids, use_cache=False).logits
    found = accelerate(model, way)
    if way not in found.layers:
        return {"skipped": f"no layer is in a format that {way} has: {'; '.join(found.reasons) or 'none is packed'}"}
    prompts = compared(reference, model(input_ids=ids, use_cache=False).logits, ids)
    exact = prompts.pop("exact_perplexity")
    return {
        "rung": way,
        "activations": activations,
        "layers": found.layers,
        "windows": len(ids),
        "seqlen": ids.shape[1],
        **compared(reference, _token_by_token(model, ids), ids),
        "exact_perplexity": exact,
        **{f"prompt_{name}": value for name, value in prompts.items()},
        "seconds": time.perf_counter() - since,
    }


def _token_by_token(model: Any, ids: Tensor) -> Tensor:
    """Logits (windows, T, vocabulary), as when a text is generated: kernels for few tokens are others than for many."""
    cache, logits = None, []
    for place in range(ids.shape[1]):
        out, cache = read_on(model, cache, input_ids=ids[:, place : place + 1])
        logits.append(out.logits)
    return torch.cat(logits, 1)


def compared(reference: Tensor, logits: Tensor, ids: Tensor) -> dict[str, float]:
    """Perplexities, mean KL(reference || other) in nats, and agreement of first choices.

    Args:
        reference, logits: (windows, T, vocabulary).
        ids: (windows, T), the tokens that they were computed from.
    """
    nll = [0.0, 0.0]
    divergence, agree = 0.0, 0
    for before, after, window in zip(reference, logits, ids, strict=True):
        p, q = (torch.log_softmax(each[:-1].double(), -1) for each in (before, after))
        for index, logp in enumerate((p, q)):
            nll[index] -= float(logp.gather(-1, window[1:, None]).sum())
        divergence += float((p.exp() * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
    predictions = ids.numel() - len(ids)
    exact, ours = (math.exp(min(700.0, total / predictions)) for total in nll)
    return {
        "exact_perplexity": exact,
        "perplexity": ours,
        "kl": divergence / predictions,
        "top1": agree / predictions,
    }
