"""Tables and sentences of the comparison with llm-compressor, from its measurements alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.sections import machine_line, number, table

Rows = Sequence[dict[str, Any]]
THEIRS = "llm-compressor"
OURS = ("compressor --no-refit --no-verify", "compressor --refit")
EQUAL = 1.001  # perplexities within a thousandth are called equal


def of(rows: Rows, model: str, tool: str) -> list[dict[str, Any]]:
    """The repetitions of one tool on one model, in order."""
    found = [row for row in rows if row["model"] == model and row["tool"] == tool]
    return sorted(found, key=lambda row: int(row["repetition"]))


def pair_ratios(rows: Rows, model: str, tool: str, what: str, base: str = THEIRS) -> list[float]:
    """``tool`` over ``base``, repetition by repetition."""
    pairs = zip(of(rows, model, tool), of(rows, model, base), strict=True)
    return [mine[what] / theirs[what] for mine, theirs in pairs]


def measured_perplexity(rows: Rows, model: str, tool: str) -> float | None:
    """The perplexity of a tool's result, where there is one."""
    return next((float(row["perplexity"]) for row in of(rows, model, tool) if row["perplexity"] is not None), None)


def model_table(rows: Rows, model: str, base_of: Mapping[str, str] | None = None) -> str:
    """Medians, and of every pair the ratios of a tool to what it is compared with (tool -> other; all to THEIRS)."""
    base_of = base_of or dict.fromkeys(OURS, THEIRS)
    out = []
    for tool in dict.fromkeys([*base_of.values(), *base_of]):
        runs = of(rows, model, tool)
        if not runs:
            continue
        line = [tool, number(measured_perplexity(rows, model, tool))]
        for what in ("seconds", "cpu_seconds"):
            line.append(f"{median(run[what] for run in runs):.1f} s")
        for what in ("peak_bytes", "tree_bytes"):
            line.append(f"{median(run[what] for run in runs) / 1e6:.0f} MB")
        for what in ("seconds", "peak_bytes"):
            ratios = pair_ratios(rows, model, tool, what, base_of.get(tool, tool))
            line.append("1" if tool not in base_of else f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        out.append(line)
    header = [model, "perplexity", "wall", "processor", "peak RSS", "all processes", "wall ratio", "memory ratio"]
    return table(header, out)


def target(what: str, value: float, limit: float) -> str:
    """``met`` or ``not met``, with the number."""
    return f"{what} x{value:.2f} (target at most {limit:.2f}): {'met' if value <= limit else '**not met**'}"


def verdicts(rows: Rows, model: str, base_of: Mapping[str, str] | None = None) -> list[str]:
    """In words, for each of our variants against what it is compared with: perplexity, time, memory."""
    sentences = []
    for tool, base in (base_of or dict.fromkeys(OURS, THEIRS)).items():
        if not of(rows, model, tool):
            continue
        parts = []
        mine, theirs = measured_perplexity(rows, model, tool), measured_perplexity(rows, model, base)
        if mine is not None and theirs is not None:
            ratio = mine / theirs
            word = "better" if ratio < 1 / EQUAL else "equal" if ratio <= EQUAL else "**worse**"
            parts.append(f"perplexity {number(mine)} against {number(theirs)}: {word}")
        parts.append(target("wall", median(pair_ratios(rows, model, tool, "seconds", base)), 1 / 3))
        parts.append(target("peak memory", median(pair_ratios(rows, model, tool, "peak_bytes", base)), 1 / 2))
        tree = median(pair_ratios(rows, model, tool, "tree_bytes", base))
        parts.append(f"all its processes together x{tree:.2f}")
        sentences.append(f"`{tool}`: {'; '.join(parts)}.")
    return sentences


def against_section(rows: Rows, setting: str, theirs: str, windows: int, their_dtype: str) -> str:
    """The whole section."""
    parts = [
        "## Side by side with llm-compressor",
        machine_line(f"the other side with {theirs}"),
        f"SparseGPT, half of every decoder projection, {setting}, the same token ids for both; whole processes, in "
        "turns, medians, and the ratios of the pairs (smallest to largest). Ours computes in float32, as on any CPU. "
        f"llm-compressor was told to compute in {their_dtype}: bfloat16, its default for a bfloat16 checkpoint, is "
        "many times slower on a CPU without instructions for it. It saves a dense checkpoint, ours a packed one. "
        f"Perplexity: {windows} windows of held-out stories, no BOS, the same evaluator for both. Peak RSS is of the "
        "largest process; `compressor --refit` verifies its result in a second process, as by default, and both "
        "processes together are in the next column.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        parts += [model_table(rows, model), "\n".join(f"- {sentence}" for sentence in verdicts(rows, model))]
    return "\n\n".join(parts)
