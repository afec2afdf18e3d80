"""The sentences a report is judged by: what was done, what it saved and cost, how plain rounding would have done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from compressor.report.footprint import footprint
from compressor.report.linear_words import linear_done, linear_headline
from compressor.report.numbers import NBSP, bytes_text, change, parameters_text, percent, significant
from compressor.report.schema import Baseline, Evaluation, EvaluationRow, Report

ARROW = "\u2192"


def row_of(text: Evaluation, who: str) -> EvaluationRow | None:
    """The first row of ``who`` (dense, compressed, baseline) on this text."""
    return next((row for row in text.rows if row.who == who), None)


def leading_text(evaluation: Sequence[Evaluation]) -> Evaluation | None:
    """The text a headline speaks of: the first that was not calibrated on, else the first."""
    return next((text for text in evaluation if not text.in_domain), evaluation[0] if evaluation else None)


def headline(report: Report) -> str:
    """``52.3 % of the bytes; stories perplexity 12.3 -> 14.1 (+14.6 %)``.

    A linearized model is as large as before: its cache and what its memory does stand there instead of the bytes.
    """
    size, quality = report.size, quality_told(report)
    if report.linearization is not None:
        return linear_headline(report.linearization, quality)
    ours = footprint(report).weight_bytes
    saved = f"{percent(ours / size.source_bytes)} of the bytes" if size.source_bytes else "size unknown"
    return f"{saved}; {quality or 'quality not measured'}"


def quality_told(report: Report) -> str:
    """``stories perplexity 12.3 -> 14.1 (+14.6 %)``; empty where nothing was measured."""
    text = leading_text(report.evaluation)
    ours = row_of(text, "compressed") if text is not None else None
    if text is None or ours is None:
        return ""
    dense = row_of(text, "dense")
    flattery = " (the calibration text: flattering)" if text.in_domain else ""
    if dense is None:
        return f"{text.name} perplexity {significant(ours.perplexity, 3)}{flattery}"
    before, after = significant(dense.perplexity, 3), significant(ours.perplexity, 3)
    worse = change(ours.perplexity, dense.perplexity)
    return f"{text.name} perplexity {before}{NBSP}{ARROW}{NBSP}{after} ({worse}){flattery}"


def what_was_done(report: Report) -> str:
    """``42 of 42 linears by sparsegpt, 50.0 % zeros, stored as bitmask; calibrated on 131,072 tokens``."""
    done = [layer for layer in report.layers if layer.method != "kept"]
    linear = linear_done(report.linearization) if report.linearization is not None else ""
    if not done:
        return linear or "nothing was changed"
    linear = f"{linear}; " if linear else ""
    methods = " and ".join(method for method, _ in Counter(layer.method for layer in done).most_common())
    if len(report.stages) > 1 and all(stage.matrices == len(done) for stage in report.stages):
        # a layer remembers only the last that it went through
        methods = ", then ".join(stage.label for stage in report.stages)
    formats = " and ".join(name for name, _ in Counter(layer.format for layer in done).most_common())
    weights = sum(layer.shape[0] * layer.shape[1] for layer in done)
    zeros = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in done) / weights
    data = report.calibration
    calibrated = f"calibrated on {data.tokens:,} tokens" if data else "data-free"
    size = report.size
    cache = ""
    if size.kv_bytes_per_token is not None and size.kv_bytes_per_token != size.source_kv_bytes_per_token:
        cache = f"; a token takes {size.kv_bytes_per_token} bytes of cache instead of {size.source_kv_bytes_per_token}"
    classes = classes_told(report)
    told = f"; {classes}" if classes else ""
    return (
        f"{linear}{len(done)} of {len(report.layers)} linears ({parameters_text(weights)} weights) by {methods}: "
        f"{f'{percent(zeros)} zeros, ' if zeros else ''}stored as {formats}; {calibrated}{told}{cache}"
    )


def classes_told(report: Report) -> str | None:
    """``20 linears are low-rank components (LRC), for fine-tuning, 8 are not (N-LRC)``; None where none has a class."""
    found = Counter(layer.component for layer in report.layers if layer.component)
    if not found:
        return None
    few, whole = found["LRC"], found["N-LRC"]
    some = "linear is a low-rank component" if few == 1 else "linears are low-rank components"
    return f"{few} {some} (LRC), for fine-tuning, {whole} {'is' if whole == 1 else 'are'} not (N-LRC)"


def kernels_told(report: Report) -> str | None:
    """``kernels (avx512, 8-bit activations) instead of exact products: perplexity 43.09 -> 43.12, KL 0.0004 ...``, or
    why it was not measured."""
    check = report.verification
    if check is None:
        return None
    if (cost := check.kernels) is None:
        return f"kernels: what they cost was not measured: {check.kernels_skipped}" if check.kernels_skipped else None
    activations = "8-bit" if cost.activations == "int8" else "exact"
    before, after = significant(cost.exact_perplexity), significant(cost.perplexity)
    windows = "window" if cost.windows == 1 else "windows"
    return (
        f"kernels ({cost.rung}, {activations} activations) instead of exact products: "
        f"perplexity {before}{NBSP}{ARROW}{NBSP}{after}, "
        f"KL {significant(cost.kl, 2)} token by token, {significant(cost.prompt_kl, 2)} in prompts "
        f"({cost.windows} {windows} of {cost.seqlen} tokens of {cost.text})"
        + ("; COMPRESSOR_ACTIVATIONS=exact does without" if cost.activations == "int8" else "")
    )


def judge(
    evaluation: Sequence[Evaluation],
    *,
    label: str,
    bits_per_weight: float,
    bytes: int,
    compressed_bytes: int | None = None,
    margin: float = 0.0,
) -> Baseline:
    """Hold the compressed model against plain rounding at the same bytes, text by text.

    By perplexity; but where one of the two is no worse than the dense model by that, which is luck with the text, by
    the divergence from the dense model.

    Args:
        bytes, compressed_bytes: sizes of the two; when they differ by more than 2 %, the verdict says so.
        evaluation: texts with a ``compressed`` and a ``baseline`` row; others are passed over.
        margin: relative difference of perplexity below which two results count as equal (0: never).
    """
    other = _other_bytes(bytes, compressed_bytes)
    label_and_size, at = f"({label}{other})", "" if other else " at the same bytes"
    pairs = []
    for text in evaluation:
        ours, plain = row_of(text, "compressed"), row_of(text, "baseline")
        if ours is not None and plain is not None:
            pairs.append(_compared(text, ours, plain))
    # "not (a <= b)" and not "a > b": a perplexity that is not a number has lost
    lost = [pair for pair in pairs if not pair[1] <= pair[2] * (1 + margin)]
    won = [pair for pair in pairs if pair not in lost and pair[1] * (1 + margin) < pair[2]]
    if not pairs:
        verdict, better = f"{label} was not evaluated, so there is nothing to hold this against", None
    elif len(lost) == len(pairs):
        verdict, better = f"Plain rounding {label_and_size} would have been better{at}: {_against(lost)}", True
    elif len(won) == len(pairs):
        verdict, better = f"Better than plain rounding {label_and_size}{at}: {_against(won)}", False
    elif not won and not lost:
        verdict, better = f"As good as plain rounding {label_and_size}{at}: {_against(pairs)}", None
    else:
        parts = [f"{word} on {_against(some)}" for word, some in (("better", won), ("worse", lost)) if some]
        verdict, better = f"Against plain rounding {label_and_size}{at}: {'; '.join(parts)}", None
    return Baseline(label=label, bits_per_weight=bits_per_weight, bytes=bytes, verdict=verdict + ".", better=better)


def members_told(members: Sequence[str]) -> str:
    """What a group of tasks is made of, in a few words."""
    return ", ".join(members) if len(members) <= 6 else f"{len(members)} tasks"


def _compared(text: Evaluation, ours: EvaluationRow, plain: EvaluationRow) -> tuple[str, float, float]:
    """What is compared, ours, and plain rounding's; less is better."""
    dense = row_of(text, "dense")
    lucky = dense is not None and min(ours.perplexity, plain.perplexity) <= dense.perplexity
    if lucky and ours.kl is not None and plain.kl is not None:
        return f"{text.name} KL", ours.kl, plain.kl
    return text.name, ours.perplexity, plain.perplexity


def _other_bytes(plain: int, compressed: int | None) -> str:
    if compressed is None or abs(plain - compressed) <= 0.02 * compressed:
        return ""
    return f"; it has {bytes_text(plain)}, this {bytes_text(compressed)}"


def _against(pairs: Sequence[tuple[str, float, float]]) -> str:
    """``stories 14.1 against 15.9, math 20.3 against 22.0``: ours first."""
    return ", ".join(f"{name} {' against '.join(told_apart(a, b))}" for name, a, b in pairs)


def told_apart(a: float, b: float) -> tuple[str, str]:
    """Two numbers in three digits, or in as many as it takes to see that they differ."""
    shown = [(significant(a, digits), significant(b, digits)) for digits in range(3, 10)]
    return next((pair for pair in shown if pair[0] != pair[1]), shown[0])
