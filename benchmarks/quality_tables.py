"""Tables and sentences of the quality benchmark, from its results alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.sections import machine_line, number, table

Results = Sequence[dict[str, Any]]
Found = dict[tuple[str, str], dict[str, Any]]  # (method, target) -> result
Cell = tuple[str, str, float]  # target, text, ratio of two perplexities
MEAN = "mean"
CLEARLY = 0.95  # "clearly below": at least five percent lower perplexity
SAME = 1.005  # what rounding in a perplexity may hide


def unique(values: Any) -> list[Any]:
    """Distinct values in order of first appearance."""
    return list(dict.fromkeys(values))


def short(text: str) -> str:
    """A text's name without its suffix."""
    return text.rsplit(".", 1)[0]


def perplexity(result: dict[str, Any], text: str) -> float:
    """Of one text, or the geometric mean over all (the exponential of the mean loss a token, texts weighted alike)."""
    values = result["perplexity"]
    if text != MEAN:
        return float(values[text])
    return math.exp(math.fsum(math.log(value) for value in values.values()) / len(values))


def lookup(results: Results, model: str, nsamples: int) -> Found:
    """(method, target) -> result."""
    return {
        (r["job"]["method"], r["job"]["target"]): r
        for r in results
        if r["job"]["model"] == model and (r["job"]["nsamples"] == nsamples or r["job"]["method"] == "dense")
    }


def text_table(found: Found, text: str) -> str:
    """Methods down, targets across, the best of every column in bold."""
    methods = unique(method for method, _ in found if method != "dense")
    targets = unique(target for method, target in found if method != "dense")
    best = {t: min(perplexity(found[m, t], text) for m in methods if (m, t) in found) for t in targets}
    rows = []
    for method in methods:
        row = [method]
        for target in targets:
            value = perplexity(found[method, target], text) if (method, target) in found else None
            row.append(f"**{number(value)}**" if value == best[target] else number(value))
        rows.append(row)
    dense = number(perplexity(found["dense", ""], text)) if ("dense", "") in found else "-"
    return table([f"{short(text)} (dense: {dense})", *targets], rows)


def compare(
    found: Found,
    method: str,
    base: str,
    *,
    wanted: Callable[[float], bool] = lambda ratio: ratio <= 1,
    targets: Sequence[str] | None = None,
) -> tuple[list[Cell], list[Cell]]:
    """Cells (target, text, perplexity of ``method`` / of ``base``) where ``wanted`` holds, and where it does not."""
    good: list[Cell] = []
    bad: list[Cell] = []
    for name, target in found:
        if name != method or (base, target) not in found or (targets is not None and target not in targets):
            continue
        for text in found[method, target]["perplexity"]:
            ratio = perplexity(found[method, target], text) / perplexity(found[base, target], text)
            (good if wanted(ratio) else bad).append((target, text, ratio))
    return good, bad


def cells(found: Sequence[Cell], limit: int = 8) -> str:
    """The worst cells in words."""
    ordered = sorted(found, key=lambda cell: -cell[2])
    named = [f"{target} on {short(text)} (x{ratio:.3f})" for target, text, ratio in ordered[:limit]]
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(named) + more


def at_or_below(found: Found, method: str, base: str) -> str | None:
    """Sentence on whether ``method`` is at or below ``base`` everywhere."""
    good, bad = compare(found, method, base)
    if not good and not bad:
        return None
    if not bad:
        return f"{method} is at or below {base} everywhere ({len(good)} of {len(good)} cells): as expected."
    close = [cell for cell in bad if cell[2] <= SAME]
    near = f" ({len(close)} of them by at most 0.5 %)" if close else ""
    return (
        f"{method} is at or below {base} in {len(good)} of {len(good) + len(bad)} cells, **not everywhere**: "
        f"above it in {len(bad)}{near}: {cells(bad)}."
    )


def magnitude_worst(found: Found) -> str | None:
    """Sentence on whether plain magnitude is the worst in every cell."""
    others = [method for method in unique(m for m, _ in found) if method not in ("dense", "magnitude")]
    above = {other: compare(found, other, "magnitude") for other in others}
    bad = [(f"{target}, {other}", text, ratio) for other in others for target, text, ratio in above[other][1]]
    total = sum(len(part) for pair in above.values() for part in pair)
    if not total:
        return None
    if not bad:
        return "magnitude is the worst everywhere: as expected."
    return f"magnitude is **not always the worst**: {len(bad)} of {total} comparisons are worse still: {cells(bad)}."


def clearly_below(found: Found, target: str = "70%") -> str | None:
    """Sentence on whether ADMM is clearly below SparseGPT at a high sparsity."""
    good, bad = compare(found, "admm", "sparsegpt", wanted=lambda ratio: ratio <= CLEARLY, targets=[target])
    if not good and not bad:
        return None
    ratios = ", ".join(f"{short(text)} x{ratio:.3f}" for _, text, ratio in [*good, *bad])
    some = f"on {len(good)} of {len(good) + len(bad)} texts, **not on all**"
    verdict = some if bad else "on every text: as expected"
    return f"admm is clearly below sparsegpt at {target} (5 % or more) {verdict} ({ratios})."


def samples_sentence(results: Results, model: str, sizes: Sequence[int]) -> list[str]:
    """What more calibration windows change, as the mean ratio over cells, for each method measured with both."""
    few, sentences = lookup(results, model, sizes[0]), []
    for size in sizes[1:]:
        many = lookup(results, model, size)
        for method in unique(m for m, _ in many if m != "dense"):
            logs = [
                math.log(perplexity(many[method, t], text) / perplexity(few[method, t], text))
                for m, t in many
                if m == method and (m, t) in few
                for text in many[m, t]["perplexity"]
            ]
            if logs:
                ratio = math.exp(math.fsum(logs) / len(logs))
                sentences.append(f"{method} x{ratio:.3f}")
        if sentences:
            ratios = ", ".join(sentences)
            return [f"{size} instead of {sizes[0]} windows change the perplexities on average by: {ratios}."]
    return []


def verdicts(found: Found) -> list[str]:
    """All sentences on the expected order that the results allow."""
    sentences = [
        magnitude_worst(found),
        *(at_or_below(found, f"{m}+refit", m) for m in ("magnitude", "wanda", "sparsegpt")),
        at_or_below(found, "admm", "sparsegpt"),
        at_or_below(found, "admm", "sparsegpt+refit"),
        clearly_below(found),
    ]
    return [sentence for sentence in sentences if sentence]


def model_section(results: Results, model: str, nsamples: int) -> str:
    """Tables and sentences of one model and one amount of calibration text."""
    found = lookup(results, model, nsamples)
    if all(method == "dense" for method, _ in found):
        return ""
    some = next(iter(found.values()))
    parts = [f"#### {model}, calibrated on {nsamples} windows of {some['job']['seqlen']}"]
    counts = ", ".join(f"{short(text)} {count}" for text, count in some["windows_of"].items())
    parts.append(f"Windows of {some['job']['seqlen']} tokens evaluated: {counts}.")
    excluded = unique(t for (_, t), r in found.items() if r.get("excluded"))
    if excluded:
        parts.append(
            f"{', '.join(excluded)}: `down_proj` is left dense by every method alike, "
            "because the pattern does not divide its inputs."
        )
    for text in [MEAN, *some["perplexity"]]:
        parts.append(text_table(found, text))
    parts.append("\n".join(f"- {sentence}" for sentence in verdicts(found)))
    return "\n\n".join(parts)


def quality_section(results: Results, calibration: str) -> str:
    """The whole section."""
    models = unique(r["job"]["model"] for r in results)
    sizes = unique(r["job"]["nsamples"] for r in results)
    parts = [
        "## Quality of the pruning methods",
        machine_line(),
        f"Perplexity (lower is better; **bold**: best of the column) on held-out text of models pruned with the text "
        f"`{calibration}`; windows that do not overlap, no BOS; the result as it was written to disk. The mean is "
        "geometric, over the texts. admm contains a refit. The expected order is magnitude worst, sparsegpt+refit and "
        "admm at or below sparsegpt everywhere, admm clearly below at 70 %; what follows the tables is computed from "
        "them.",
    ]
    for model in models:
        parts.append(f"### {model}")
        parts += [section for size in sizes if (section := model_section(results, model, size))]
        parts += samples_sentence(results, model, sizes)
    return "\n\n".join(parts)
