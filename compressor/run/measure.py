"""Quality on held-out text: perplexity, KL divergence to the dense model, agreement of first choices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.calibration import EvaluationText, TokenWindows, load_evaluation, named_set, same_text
from compressor.engine.forward import BlockRunner, Stream
from compressor.errors import UserError, in_words_of
from compressor.report.numbers import percent

# What to judge on when nothing is asked for: never what was calibrated on.
COUNTERPARTS = {"embedded": "embedded-heldout", "c4": "wikitext2-test", "wikitext2": "c4-validation"}
HUB_DEFAULT = "wikitext2-test"
LOCAL_DEFAULT = "embedded-heldout"

# What reads a text does not know what it is for: errors are said in the flags of `evaluate`, or of a run.
JUDGE_WORDS = {"calibration set": "text", "calibration source": "evaluation text", "--calibration": "--text"}
RUN_WORDS = {
    "calibration set": "text",
    "calibration source": "evaluation text",
    "--calibration": "--eval",
    "--text": "--eval",
    "--windows": "--eval-windows",
    "--seqlen": "--eval-seqlen",
}

LOGITS_AT_ONCE = 1 << 24  # elements (windows x length x vocabulary) computed together


def default_texts(sources: Sequence[str]) -> tuple[str, ...]:
    """Evaluation text for calibration sources: a counterpart of a named set; the embedded text for local files."""
    names = [re.split(r"[:@]", source)[0] for source in sources]
    known = [COUNTERPARTS[name] for name in names if name in COUNTERPARTS]
    if known:
        return (known[0],)
    remote = any(_is_hub_set(name) for name in names)
    return (HUB_DEFAULT if remote else LOCAL_DEFAULT,)


def _is_hub_set(name: str) -> bool:
    if name == "self" or Path(name).suffix:
        return False
    try:
        return named_set(name).kind == "hub"
    except UserError:
        return False


@dataclass(frozen=True)
class Texts:
    """Evaluation texts laid end to end: ``ids`` (windows, seqlen), and the rows that belong to each text."""

    texts: tuple[EvaluationText, ...]
    ids: Tensor

    def span(self, number: int) -> slice:
        """Rows of text ``number``."""
        start = sum(len(text.ids) for text in self.texts[:number])
        return slice(start, start + len(self.texts[number].ids))


def load_texts(
    specs: Sequence[str],
    tokenizer: Any,
    *,
    seqlen: int,
    windows: int | None,
    words: Mapping[str, str] = JUDGE_WORDS,
    **protocol: Any,
) -> Texts:
    """Load evaluation texts; at most ``windows`` windows of each, fewer where a text is shorter.

    Args:
        words: in which errors are said, so that they name the flags of the verb.

    Raises:
        UserError: a text is unknown, unreadable, or shorter than one window.
    """
    loaded = []
    for spec in specs:
        with in_words_of(words):
            everything = load_evaluation(spec, tokenizer, seqlen=seqlen, windows=None, **protocol)
            if windows is not None and len(everything.ids) > windows:
                everything = load_evaluation(spec, tokenizer, seqlen=seqlen, windows=windows, **protocol)
        loaded.append(everything)
    return Texts(tuple(loaded), torch.cat([text.ids for text in loaded]))


@dataclass
class Tally:
    """Sums over the windows of one text for one model, all in nats, kept a number per window."""

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agree: list[int] = field(default_factory=list)
    predictions: int = 0

    def row(self, who: str, label: str, text: EvaluationText, *, compared: bool) -> dict[str, Any]:
        """The report's row."""
        mean = math.fsum(self.nll) / self.predictions
        per_window = [value * len(self.nll) / self.predictions for value in self.nll]
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in per_window) / max(1, len(per_window) - 1))
        return {
            "who": who,
            "label": label,
            "perplexity": _exp(mean),
            "bits_per_byte": mean / math.log(2) * text.n_tokens / text.n_bytes if text.n_bytes else None,
            "kl": _divergence(math.fsum(self.kl) / self.predictions) if compared else None,
            "top1": sum(self.agree) / self.predictions if compared else None,
            "nll_per_window_stderr": spread / math.sqrt(len(per_window)) if len(per_window) > 1 else None,
        }


def _divergence(mean: float) -> float:
    """A divergence is never below zero; the fp32 sum of one that is zero may be, by rounding alone."""
    return 0.0 if -1e-6 < mean < 0 else mean


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def measure(
    models: dict[str, tuple[str, BlockRunner, Stream]], texts: Texts, against: str | None
) -> list[list[dict[str, Any]]]:
    """Compare models whose streams have passed all their blocks.

    Args:
        models: role -> (label, runner, stream of ``texts.ids``).
        against: role of the model that KL and agreement refer to, or ``None``.

    Returns:
        For each text, a row for each model.

    Raises:
        UserError: logits are not finite; such a window is never skipped.
    """
    out = []
    vocabulary = max(runner.skeleton.config.get_text_config().vocab_size for _, runner, _ in models.values())
    batch = max(1, LOGITS_AT_ONCE // (texts.ids.shape[1] * vocabulary))
    for number, text in enumerate(texts.texts):
        tallies = {who: Tally() for who in models}
        span = texts.span(number)
        for start in range(span.start, span.stop, batch):
            rows = slice(start, min(start + batch, span.stop))
            reference: Tensor | None = None
            for who in sorted(models, key=lambda who: who != against):
                label, runner, stream = models[who]
                logp = torch.log_softmax(runner.logits(stream, rows)[:, :-1], dim=-1)
                _count(tallies[who], logp, texts.ids[rows, 1:].to(logp.device), reference, f"{label} on {text.name}")
                if who == against:
                    reference = logp
        out.append(
            [
                tallies[who].row(who, models[who][0], text, compared=against is not None and who != against)
                for who in models
            ]
        )
    return out


def _count(tally: Tally, logp: Tensor, targets: Tensor, reference: Tensor | None, where: str) -> None:
    """Add windows: ``logp`` (windows, T, vocabulary) fp32, ``targets`` (windows, T)."""
    nll = -logp.gather(-1, targets[..., None])[..., 0].double().cpu()
    if not bool(torch.isfinite(nll).all()):
        raise UserError(f"{where}: the model's logits are NaN or infinite", fix="try --dtype float32, or another base")
    tally.nll += [math.fsum(window) for window in nll.tolist()]
    tally.predictions += targets.numel()
    if reference is not None:
        divergence = (reference.exp() * (reference - logp)).sum(-1).double().cpu()
        tally.kl += [math.fsum(window) for window in divergence.tolist()]
        tally.agree.append(int((reference.argmax(-1) == logp.argmax(-1)).sum()))


def in_domain(calibration: TokenWindows | None, text: EvaluationText) -> tuple[bool, str]:
    """Whether a text was calibrated on, and why that is said."""
    if calibration is None:
        return False, "nothing was calibrated on"
    verdict = same_text(calibration, text)
    if verdict.same:
        return True, f"{verdict.why}: {verdict.source}" if verdict.source else verdict.why
    return False, f"{percent(verdict.shared)} of its 16-grams occur in the calibration windows"


def protocol(text: EvaluationText, dtype: torch.dtype) -> dict[str, Any]:
    """What must be equal for two perplexities to be compared."""
    return {**text.protocol, "sha256": text.sha256, "compute": str(dtype).removeprefix("torch.")}
