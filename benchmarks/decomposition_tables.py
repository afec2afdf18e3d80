"""Tables and sentences of the decomposition benchmark, from its results alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.quality_tables import short, unique
from benchmarks.quantization_tables import WORTH_A_RATIO, by_row, gap, mean_gap
from benchmarks.sections import machine_line, table

Results = Sequence[dict[str, Any]]
Found = dict[str, dict[str, Any]]

SHARES = (90, 80, 60)
"""Percent of the parameters of the linears that are kept."""

TARGET = 0.7  # of the published formula's loss, at 80 and 60 % kept
BY_CHANCE = 0.005  # nats: losses that differ by so little count as the same
ENERGY, PAPER, DOBI = "svd-llm energy", "svd-llm paper", "dobi"


def own_text(found: Found, calibration: str) -> str | None:
    """The held-out text of the calibration's kind."""
    return next((text for text in found["dense"]["perplexity"] if short(text) == calibration), None)


def losses(found: Found, row: str, calibration: str) -> dict[str, float]:
    """Mean loss over the texts, and that on the calibration's kind of text where there is one."""
    own = own_text(found, calibration)
    values = {"mean": mean_gap(found, row)}
    return values if own is None else {**values, short(own): gap(found[row], found["dense"], own)}


def told(values: dict[str, float]) -> str:
    """Losses in words."""
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def integer_rows(found: Found) -> list[str]:
    """Rows of plain integers, fewest bits first."""
    rows = [row for row in found if row.startswith("gptq ")]
    return sorted(rows, key=lambda row: float(found[row]["bits_half"]))


def nearest_integers(found: Found, bits: float) -> str | None:
    """The row of plain integers whose bytes are nearest to ``bits`` a weight."""
    rows = integer_rows(found)
    return min(rows, key=lambda row: abs(found[row]["bits_half"] - bits)) if rows else None


def at_share(found: Found, share: int) -> list[str]:
    """Rows that keep ``share`` percent, in the order in which they were run."""
    return [row for row in found if f" {share} %" in row]


def rows_table(found: Found, rows: Sequence[str]) -> str:
    """Bits and the loss against dense on every text."""
    dense = found["dense"]
    texts = list(dense["perplexity"])
    lines = []
    for row in rows:
        result = found[row]
        each = [gap(result, dense, text) for text in texts]
        bits = [f"{result['bits']:.3f}", f"{result['bits_half']:.3f}"]
        lines.append([row, *bits, *(f"{loss:+.4f}" for loss in [*each, mean_gap(found, row)])])
    heads = ["method", "bits, linears", "of a 16-bit source", *(short(text) for text in texts), "mean"]
    return table(heads, lines)


def beside(found: Found, rows: Sequence[str]) -> list[str]:
    """The integers to set beside ``rows``: those nearest in bytes to them, and 4-bit ones, fewest bits last."""
    chosen = {nearest_integers(found, found[row]["bits_half"]) for row in rows} | {"gptq 4-bit"}
    return [row for row in reversed(integer_rows(found)) if row in chosen]


def tables(found: Found) -> list[str]:
    """A table for every share with integers below its rows, and one of the integers and what belongs to them."""
    parts = []
    for share in SHARES:
        if rows := at_share(found, share):
            parts += [f"{share} % kept, and integers in as many bytes or fewer:"]
            parts += [rows_table(found, [*rows, *beside(found, rows)])]
    low = [row for row in found if "4-bit factors" in row or "then gptq" in row]
    rest = sorted([*integer_rows(found), *low], key=lambda row: float(found[row]["bits_half"]))
    return [*parts, "Integers alone, and factors in integers, by bytes:", rows_table(found, rest)] if rest else parts


def target_sentence(found: Found, row: str, base: str, target: float | None, calibration: str) -> str | None:
    """How much of the loss of ``base`` is left in ``row``, in the mean and on the calibration's kind of text."""
    if row not in found or base not in found:
        return None
    theirs = losses(found, base, calibration)
    parts = []
    for name, value in losses(found, row, calibration).items():
        part = f"{name} {value:.4f} against {theirs[name]:.4f}"
        if theirs[name] >= WORTH_A_RATIO:
            met = "" if target is None else ", met" if value <= target * theirs[name] else ", **not met**"
            part += f" (x{value / theirs[name]:.2f}{met})"
        parts.append(part)
    goal = "" if target is None else f", target at most x{target}"
    return f"{row}, beside {base}{goal}: {'; '.join(parts)}."


def better_sentence(found: Found, row: str, base: str, calibration: str) -> str | None:
    """Whether ``row`` loses less than ``base``; the bits of both."""
    if row not in found or base not in found:
        return None
    theirs = losses(found, base, calibration)
    parts = []
    for name, value in losses(found, row, calibration).items():
        more = value - theirs[name]
        word = "does not beat it, the same but for chance" if abs(more) <= BY_CHANCE else ""
        word = word or (f"better by {-more:.4f}" if more < 0 else f"**does not beat it**, by {more:.4f}")
        parts.append(f"{name} {value:.4f} against {theirs[name]:.4f}, {word}")
    bits = f"({found[row]['bits_half']:.2f} bits) beside {base} ({found[base]['bits_half']:.2f} bits)"
    return f"{row} {bits}: {'; '.join(parts)}."


def buy_sentence(found: Found, share: int, factors: str, calibration: str) -> str | None:
    """The fewest bits of plain integers that lose no more than the best row of a share, with factors of a kind."""
    rows = [row for row in at_share(found, share) if "then gptq" not in row]
    rows = [row for row in rows if ("8-bit factors" in row) == (factors == "8-bit")]
    if not rows or not integer_rows(found):
        return None
    best = min(rows, key=lambda row: mean_gap(found, row))
    mine, bits = losses(found, best, calibration), found[best]["bits_half"]
    start = f"{share} % kept, {factors} factors: the best is {best} ({bits:.2f} bits; {told(mine)})"
    for row in integer_rows(found):
        theirs, less = losses(found, row, calibration), bits / found[row]["bits_half"]
        # a loss below zero is luck with a text, not something to be matched
        if less >= 1 and all(theirs[name] <= max(0.0, mine[name]) + BY_CHANCE for name in mine):
            what = f"{row} ({found[row]['bits_half']:.2f} bits; {told(theirs)}) loses no more"
            return f"{start}; {what}: quantization is the better buy, by x{less:.1f} in bytes."
    return f"{start}; no row of integers in as few bytes loses as little: low rank is the better buy."


def verdicts(found: Found, calibration: str) -> list[str]:
    """What the numbers say of the targets, and of integers."""
    sentences: list[str | None] = []
    for share in SHARES:
        target = TARGET if share < 90 else None
        sentences.append(target_sentence(found, f"{ENERGY} {share} %", f"{PAPER} {share} %", target, calibration))
    for rule in (DOBI, "svd-llm uniform", "svd-llm welore", f"{ENERGY}, 8-bit factors"):
        for share in SHARES:
            sentences.append(better_sentence(found, f"{rule} {share} %", f"{ENERGY} {share} %", calibration))
    for row in found:
        if ("then gptq" in row or "4-bit factors" in row) and (
            near := nearest_integers(found, found[row]["bits_half"])
        ):
            sentences.append(better_sentence(found, row, near, calibration))
    sentences += [buy_sentence(found, share, kind, calibration) for share in SHARES for kind in ("16-bit", "8-bit")]
    return [sentence for sentence in sentences if sentence]


def decomposition_section(results: Results, calibration: str) -> str:
    """The whole section."""
    first = results[0]
    parts = [
        "## Quality of the decomposing methods",
        machine_line(),
        "Loss against the dense model on held-out text, `ln ppl - ln ppl_dense` in nats a token, by the share of the "
        f"linears' parameters that is kept; calibrated on {first['nsamples']} windows of {first['seqlen']} of "
        f"`{calibration}`; windows that do not overlap, no BOS, at most {first['windows']} of each text; the result as "
        "it was written to disk. Factors are in 16 bits where nothing else is said; 8-bit ones at the same share take "
        "about the same bytes: a parameter in 8 bits counts as half of one, and scales count. Bits per weight of "
        "linears are given twice: as written, where matrices that stay whole keep the source's dtype (32 bits in the "
        "two small models), and had the source been in 16 bits; bytes are compared by the second. "
        "Integers are of GPTQ in groups of 128 inputs, or the whole row where it is shorter. "
        "`svd-llm paper` is the published formula: uniform ranks, "
        "statistics of the dense model.",
    ]
    for model in unique(r["model"] for r in results):
        found = by_row(results, model)
        perplexities = ", ".join(f"{short(text)} {value:.4g}" for text, value in found["dense"]["perplexity"].items())
        parts += [f"### {model}, decomposed", f"Perplexity of the dense model: {perplexities}.", *tables(found)]
        parts.append("\n".join(f"- {sentence}" for sentence in verdicts(found, calibration)))
    return "\n\n".join(part for part in parts if part)
