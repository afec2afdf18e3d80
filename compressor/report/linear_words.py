"""What can be said of a linearized model: the table of checks, and honest sentences about its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressor.report.numbers import NBSP, bytes_text, change, percent, significant
from compressor.report.schema_linear import Linearization, Positions, Proof, Recall, RecallRow, Who

NEEDED = 0.01
"""Nats per token that the windows alone must lose to the teacher for a text to tell anything of a memory."""

ABLE = 0.05
"""Nats per token that a teacher must gain from a first occurrence for its student to be judged by it."""


@dataclass(frozen=True)
class Check:
    """A row of the table; ``passed`` is None where a finding is no question of right and wrong."""

    what: str
    found: str
    allowed: str = ""
    passed: bool | None = None


def has_window(linearization: Linearization) -> bool:
    """Whether linearized layers attend to the last tokens exactly; without, distances have a unit all the same."""
    mixer = linearization.mixer
    return linearization.own_code and bool(mixer.get("window")) and mixer.get("join") != "memory"


def checks(proof: Proof, *, window: bool = True) -> list[Check]:
    """Whether the model computes what it should, in every way it can be called.

    Args:
        window: whether there is one, as `has_window` says.
    """
    rows = []
    exact = proof.exactness
    if exact is not None:
        texts = f"{exact.texts} texts of {exact.tokens} tokens"
        if not exact.by_construction:
            inside = " inside the window" if window else ""
            rows.append(Check(f"the teacher\u2019s logits{inside} ({texts})", "not exact by construction"))
        elif exact.to_softmax is not None:
            what = f"inside the window, what softmax attention with the same weights gives ({texts})"
            rows.append(Check(what, significant(exact.to_softmax, 2), significant(exact.allowed, 2), exact.passed))
        else:
            what = f"the teacher\u2019s logits inside the window, whose weights differ in kind ({texts})"
            rows.append(Check(what, significant(exact.to_teacher, 2)))
        if not exact.by_construction or exact.to_softmax is not None:
            rows.append(Check(f"difference to the teacher on these {texts}", significant(exact.to_teacher, 2)))
    for row in proof.agreement:
        what = f"the same, {row.way} ({row.tokens:,} tokens)"
        rows.append(Check(what, significant(row.difference, 2), significant(row.allowed, 2), row.passed))
    return rows


def failed(linearization: Linearization) -> list[str]:
    """Checks that failed, in words."""
    proof = linearization.proof
    return (
        [check.what for check in checks(proof, window=has_window(linearization)) if check.passed is False]
        if proof is not None
        else []
    )


def beyond(positions: Positions, who: Who) -> float | None:
    """Perplexity over all predictions with more than a window before them; None where there are none."""
    row = next((row for row in positions.rows if row.who == who), None)
    tokens = sum(positions.tokens[1:])
    if row is None or not tokens:
        return None
    logs = [math.log(value) * n for value, n in zip(row.perplexities[1:], positions.tokens[1:], strict=True)]
    mean = sum(logs) / tokens
    return math.exp(mean) if mean < 700 else math.inf


def memory_verdict(linearization: Linearization) -> tuple[str, bool | None]:
    """One sentence on what the memory does beyond the window, and whether that is good; None where nobody knows."""
    positions = linearization.proof.positions if linearization.proof is not None else None
    if positions is None:
        return "What the memory does was not measured", None
    whole, alone = beyond(positions, "student"), beyond(positions, "window")
    if whole is None:
        return "No evaluated text is longer than the window: what lies beyond was not measured", None
    if alone is None or positions.gain is None:
        words = f"beyond {positions.window} tokens perplexity is {significant(whole, 3)}"
        if linearization.mixer.get("join") == "window":
            return f"There is no memory, the window is all: {words}", None
        if not has_window(linearization):
            return f"There is no window, the {'memory' if linearization.own_code else 'state'} is all: {words}", None
        return f"The parts cannot be told apart: {words}", None
    if not math.isfinite(positions.gain):
        return "The losses are no finite numbers: the model is broken", False
    error = positions.gain_stderr
    numbers = f"{significant(alone, 3)} without it, {significant(whole, 3)} with it"
    if error is not None and not abs(positions.gain) > 2 * error:
        return f"The memory does nothing that can be measured: perplexity beyond the window is {numbers}", None
    if positions.gain > 0:
        less = percent(1 - math.exp(-positions.gain))
        return f"The memory lowers perplexity beyond the window by {less}: {numbers}", True
    return f"The memory does harm beyond the window: perplexity is {numbers}", False


def reach_words(linearization: Linearization) -> str:
    """How much there was to gain beyond the window: a text that needs no more than a window proves no memory."""
    positions = linearization.proof.positions if linearization.proof is not None else None
    if positions is None:
        return ""
    only = linearization.mixer.get("join") == "window"
    teacher, alone = beyond(positions, "teacher"), beyond(positions, "student" if only else "window")
    whole = beyond(positions, "student")
    if teacher is None or alone is None or whole is None or not all(map(math.isfinite, (teacher, alone, whole))):
        return ""
    lost = math.log(alone / teacher)
    numbers = f"the teacher comes to {significant(teacher, 3)} there, windows alone to {significant(alone, 3)}"
    if lost < NEEDED:
        return f"This text hardly needs what lies beyond a window: {numbers}. It tells little about a memory."
    if only:
        return f"What lies beyond the window is worth {significant(lost, 2)} nats per token on this text: {numbers}."
    if whole >= alone:
        return (
            f"Of the {significant(lost, 2)} nats per token that windows alone lose to the teacher, nothing is regained."
        )
    regained = math.log(alone / whole) / lost
    words = "all" if regained >= 1 else percent(regained, 0)
    return f"Of the {significant(lost, 2)} nats per token that windows alone lose to the teacher, {words} is regained."


def able(row: RecallRow) -> bool:
    """Whether the teacher's gain is one: more than chance, and enough to be seen in a student."""
    return row.gain > max(ABLE, 2 * (row.gain_stderr or 0.0))


def _at(recall: Recall, distance: int) -> dict[Who, RecallRow]:
    return {row.who: row for row in recall.rows if row.distance == distance}


def hollow(at: dict[Who, RecallRow]) -> str:
    """Why a student's gain is no recall; empty where it may be one. Who begins worse has more to gain from anything."""
    student, teacher, window = at["student"], at["teacher"], at.get("window")
    if window is not None and student.loss >= window.loss:
        return "a greater loss than without the memory"
    if student.loss >= teacher.loss + teacher.gain:
        return "a greater loss than the teacher that has not seen it"
    return ""


def recall_verdict(recall: Recall, distance: int) -> str:
    """What the trials at one distance say of the memory."""
    at = _at(recall, distance)
    if "teacher" not in at or "student" not in at:
        return "not measured"
    teacher, student, window = at["teacher"], at["student"], at.get("window")
    if not able(teacher):
        return "the teacher cannot: no conclusion"
    if why := hollow(at):
        return f"no recall: {why}"
    part = f"{percent(student.gain / teacher.gain, 0)} of the teacher\u2019s gain"
    if window is None:
        return part
    noise = 2 * math.hypot(student.gain_stderr or 0.0, window.gain_stderr or 0.0)
    if student.gain - window.gain > noise:
        return f"{part}, {percent(window.gain / teacher.gain, 0)} without the memory"
    return f"{part}: no more than without the memory"


def recall_summary(recall: Recall, *, window: bool = True) -> str:
    """One sentence on all distances, in windows where there are any."""
    every = [_at(recall, distance) for distance in dict.fromkeys(row.distance for row in recall.rows)]
    both = [at for at in every if "teacher" in at and "student" in at]
    if not both:
        return "No distance had room for the passage."
    can = [at for at in both if able(at["teacher"])]
    if not can:
        return (
            "The teacher itself gains nothing from having seen a passage before, at any distance: "
            "of recall nothing can be concluded."
        )

    def far(at: dict[Who, RecallRow]) -> str:
        row = at["teacher"]
        return f"{row.windows:g} windows" if window else f"{row.distance:,} tokens"

    told = ", ".join(
        f"{'nothing' if hollow(at) else percent(at['student'].gain / at['teacher'].gain, 0)} at {far(at)}" for at in can
    )
    return f"Of what the teacher gains from having seen a passage before, the linearized model gains {told}."


def cache_words(linearization: Linearization) -> str:
    """``cache constant, 74.2 kB`` or ``a token takes 512 of 1,280 bytes of cache``."""
    decode = linearization.proof.decode if linearization.proof is not None else None
    if decode is None or not decode.rows:
        layers = len(linearization.linearized)
        return f"{layers} of {layers + len(linearization.kept)} layers hold a constant state instead of a growing cache"
    ours, theirs = decode.student_bytes_per_token, decode.teacher_bytes_per_token
    if ours < 0.5:
        return f"cache constant, {bytes_text(decode.rows[-1].student_bytes)}"
    return f"a token takes {ours:,.0f} of {theirs:,.0f} bytes of cache"


def linear_headline(linearization: Linearization, quality: str) -> str:
    """``perplexity 12.3 -> 14.1 (+14.6 %); cache constant, 74.2 kB; the memory does nothing that can be measured``.

    Args:
        quality: what the evaluation says; empty where there was none, the proof's own perplexity stands in then.
    """
    words = memory_verdict(linearization)[0].split(":")[0]
    return "; ".join([quality or own_quality(linearization), cache_words(linearization), words[:1].lower() + words[1:]])


def own_quality(linearization: Linearization) -> str:
    """Perplexity of teacher and student on the text of the proof."""
    positions = linearization.proof.positions if linearization.proof is not None else None
    whole = {row.who: row.whole for row in positions.rows} if positions is not None else {}
    if positions is None or "teacher" not in whole or "student" not in whole:
        return "quality not measured"
    before, after = whole["teacher"], whole["student"]
    name = f"{positions.text} " if positions.text else ""
    arrow = f"{significant(before, 3)}{NBSP}\u2192{NBSP}{significant(after, 3)}"
    return f"{name}perplexity {arrow} ({change(after, before)})"


def linear_done(linearization: Linearization) -> str:
    """``attention of 4 of 5 layers linearized by windowed (window 64, sinks 4), layer 2 keeps softmax; trained on``."""
    own, kept = len(linearization.linearized), linearization.kept
    mixer = linearization.mixer
    settings = ", ".join(f"{name} {mixer[name]}" for name in ("window", "sinks", "features") if mixer.get(name))
    settings = f" ({settings})" if settings else ""
    stays = (
        f", layer{'s' * (len(kept) > 1)} {', '.join(map(str, kept))} keep{'s' * (len(kept) == 1)} softmax"
        if kept
        else ""
    )
    transfer = max((point.tokens for entry in linearization.transfer for point in entry.curve), default=0)
    trained = [f"{transfer:,} tokens of attention transfer"] if transfer else []
    if linearization.distillation is not None:
        longer = linearization.distillation.longer
        last = f", {longer.tokens:,} of them in windows of {longer.seqlen:,}" if longer is not None else ""
        trained.append(f"{linearization.distillation.tokens:,} tokens end to end{last}")
    training = f"; trained on {' and '.join(trained)}" if trained else "; not trained"
    made = f"attention of {own} of {own + len(kept)} layers linearized by {linearization.method}"
    return f"{made}{settings}{stays}{training}"
