"""Tables and sentences of the quantization benchmark, from its results alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.quality_tables import short, unique
from benchmarks.sections import machine_line, table

Results = Sequence[dict[str, Any]]
TRIT_TARGET = 0.4  # of the published fit's loss, at the same bytes
WORTH_A_RATIO = 0.02  # nats; below, two losses differ by chance
BINARY_TARGETS = {"pb-llm 10 %": 0.6, "pb-llm columns": 1.0, "pb-llm 10 % learned": 0.35}  # of the published fit's
NEAR_DENSE = 1.025  # perplexity of three planes against dense


def gap(result: dict[str, Any], dense: dict[str, Any], text: str) -> float:
    """``ln ppl - ln ppl_dense`` on one text, nats a token."""
    return math.log(result["perplexity"][text]) - math.log(dense["perplexity"][text])


def by_row(results: Results, model: str) -> dict[str, dict[str, Any]]:
    """Row -> result, of one model."""
    return {r["row"]: r for r in results if r["model"] == model}


def model_table(found: dict[str, dict[str, Any]]) -> str:
    """Rows by true bits, the loss against dense on every text."""
    dense = found["dense"]
    texts = list(dense["perplexity"])
    rows = [["dense", "-", f"{dense['bits_model']:.2f}", *(f"{dense['perplexity'][text]:.4g}" for text in texts)]]
    for name, result in sorted(found.items(), key=lambda item: item[1]["bits"] or 0):
        if name != "dense":
            losses = [f"{gap(result, dense, text):+.4f}" for text in texts]
            rows.append([name, f"{result['bits']:.3f}", f"{result['bits_model']:.2f}", *losses])
    heads = ["method", "bits, linears", "bits, model", *(short(text) for text in texts)]
    return table(heads, rows)


def mean_gap(found: dict[str, dict[str, Any]], row: str) -> float:
    """Mean over all texts."""
    dense = found["dense"]
    return math.fsum(gap(found[row], dense, text) for text in dense["perplexity"]) / len(dense["perplexity"])


ELSEWHERE = {
    "pb-llm 10 % learned": " This is block by block, on these windows; end to end, with windows of the model's own "
    "text beside them, it is x0.32 over both models (docs/quantization.md).",
}
"""What a row's verdict should not be read without."""


def ratio_sentence(found: dict[str, dict[str, Any]], row: str, base: str, target: float | None) -> str | None:
    """One sentence on how much of the loss of ``base`` is left in ``row``; ratios only of losses worth a ratio."""
    if row not in found or base not in found:
        return None
    ours, theirs = mean_gap(found, row), mean_gap(found, base)
    told = f"{row}: mean loss {ours:.4f}, that of {base} {theirs:.4f}"
    if theirs >= WORTH_A_RATIO:
        met = "met" if target is not None and ours <= target * theirs else "**not met**"
        told += f", x{ours / theirs:.2f}" + ("" if target is None else f" (target at most x{target}: {met})")
    dense = found["dense"]
    losses = {text: (gap(found[row], dense, text), gap(found[base], dense, text)) for text in dense["perplexity"]}
    each = [f"{short(text)} x{a / b:.2f}" for text, (a, b) in losses.items() if b >= WORTH_A_RATIO]
    more = ELSEWHERE.get(row, "")
    return f"{told}; by text, where there is a loss to speak of: {', '.join(each) or 'none'}.{more}"


def line_sentence(found: dict[str, dict[str, Any]], row: str, low: str, high: str, text: str) -> str | None:
    """Whether ``row`` lies below the straight line, log loss over true bits, from ``low`` to ``high`` on a text."""
    if not {row, low, high} <= found.keys():
        return None
    dense = found["dense"]
    losses = {name: gap(found[name], dense, text) for name in (row, low, high)}
    if min(losses.values()) <= 0:
        return f"{row} on {short(text)}: a loss is not positive, no line can be drawn."
    bits = {name: found[name]["bits"] for name in (row, low, high)}
    share = (bits[row] - bits[low]) / (bits[high] - bits[low])
    expected = math.exp((1 - share) * math.log(losses[low]) + share * math.log(losses[high]))
    word = "below" if losses[row] < expected else "**above**"
    return (
        f"{row} ({bits[row]:.2f} bits) on {short(text)}: loss {losses[row]:.4f}, the line from {low} to {high} has "
        f"{expected:.4f} there: {word}."
    )


def near_dense_sentence(found: dict[str, dict[str, Any]], row: str) -> str | None:
    """How close to dense perplexity a row comes on every text."""
    if row not in found:
        return None
    ratios = {text: math.exp(gap(found[row], found["dense"], text)) for text in found["dense"]["perplexity"]}
    within = all(ratio <= NEAR_DENSE for ratio in ratios.values())
    told = ", ".join(f"{short(text)} x{ratio:.3f}" for text, ratio in ratios.items())
    return f"{row}: {told} (target at most x{NEAR_DENSE}: {'met' if within else '**not met everywhere**'})."


def verdicts(found: dict[str, dict[str, Any]], calibration: str) -> list[str]:
    """What the numbers say of the targets."""
    own = next((text for text in found["dense"]["perplexity"] if short(text) == calibration), None)
    sentences = [
        ratio_sentence(found, "trit-planes K=2", "trit-planes K=2 paper", TRIT_TARGET),
        line_sentence(found, "trit-planes K=2", "gptq 3-bit", "gptq 4-bit", own) if own else None,
        *(ratio_sentence(found, f"gptq {b}-bit learned", f"gptq {b}-bit", None) for b in (2, 3, 4)),
        ratio_sentence(found, "trit-planes K=2 learned", "trit-planes K=2 paper", TRIT_TARGET),
        near_dense_sentence(found, "trit-planes K=3"),
        ratio_sentence(found, "ptq161", "ptq161 paper", None),
        ratio_sentence(found, "ptq161 learned", "ptq161 paper learned", None),
        *(ratio_sentence(found, row, "pb-llm 10 % paper", target) for row, target in BINARY_TARGETS.items()),
    ]
    return [sentence for sentence in sentences if sentence]


def additions_table(found: dict[str, dict[str, Any]]) -> str:
    """What learning and corrections buy on top of plain codes, and what for each bit that they add."""
    rows = []
    for base in ("gptq 2-bit", "gptq 3-bit", "gptq 4-bit"):
        for row in (f"{base} learned", f"{base} + rank 4", f"{base} + rank 8 in 4 bits"):
            if {row, base} <= found.keys():
                added = found[row]["bits"] - found[base]["bits"]
                before, after = mean_gap(found, base), mean_gap(found, row)
                each = f"{(before - after) / added:+.4f}" if added > 1e-9 else "no bits"
                rows.append([row, f"{before:+.4f}", f"{after:+.4f}", f"{added:.3f}", each])
    heads = ["on top of gptq", "mean loss before", "after", "bits added", "gain for a bit"]
    return table(heads, rows) if rows else ""


def quantization_section(results: Results, calibration: str) -> str:
    """The whole section."""
    first = results[0]
    parts = [
        "## Quality of the quantizing methods",
        machine_line(),
        f"Loss against the dense model on held-out text, `ln ppl - ln ppl_dense` in nats a token (dense: perplexity), "
        f"calibrated on {first['nsamples']} windows of {first['seqlen']} of `{calibration}`; windows that do not "
        f"overlap, no BOS, at most {first['windows']} of each text; the result as it was written to disk. Bits count "
        "scales, masks, zeros and padding. Groups of 128 inputs, or the whole row where it is shorter.",
    ]
    for model in unique(r["model"] for r in results):
        found = by_row(results, model)
        parts += [f"### {model}, quantized", model_table(found)]
        parts += [additions_table(found), "\n".join(f"- {sentence}" for sentence in verdicts(found, calibration))]
    return "\n\n".join(part for part in parts if part)
