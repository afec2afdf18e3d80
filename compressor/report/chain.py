"""A chain of runs, each on the output of the one before: what every one left, against the original model.

A perplexity is put beside others only where tokens and protocol are the same. What a run calls its dense model is the
output of the run before, so a text that an earlier run did not have may still be known of its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressor.report.comparable import comparable_key, token_hash
from compressor.report.footprint import footprint
from compressor.report.numbers import NBSP, change, percent, significant
from compressor.report.schema import Evaluation, EvaluationRow, Report
from compressor.report.schema_chain import EarlierRun
from compressor.report.sentences import ARROW, row_of, what_was_done


@dataclass(frozen=True)
class Score:
    """One model on one text; ``again``: measured by the next run, as its source."""

    row: EvaluationRow
    again: bool


@dataclass(frozen=True)
class Link:
    """One model of the chain: number 0 is the original, number k the output of the k-th run.

    Attributes:
        run: what made it; ``None`` for the original.
        scores: one for each text of the chain; ``None`` where it was not measured on that.
    """

    number: int
    name: str
    run: EarlierRun | None
    bytes: int
    bits_linears: float | None
    bits_model: float | None
    sparsity: float | None
    scores: list[Score | None]


@dataclass(frozen=True)
class Chain:
    """All models from the original on; ``texts`` in the order of the scores, the one that most were measured on first.

    ``told`` says for each text what distinguishes it where two have one name.
    """

    texts: list[Evaluation]
    told: list[str]
    links: list[Link]

    @property
    def summary(self) -> str:
        """``Run 2 of a chain: 39.8 % of the bytes of toy, stories perplexity 2.28 -> 2.33 (+2.0 %)``."""
        first, last = self.links[0], self.links[-1]
        share = f"{percent(last.bytes / first.bytes)} of the bytes of {first.name}" if first.bytes else first.name
        told = f"Run {last.number} of a chain; against the original: {share}"
        for name, before, after in zip(self.told, first.scores, last.scores, strict=True):
            if before is not None and after is not None:
                start, end = before.row.perplexity, after.row.perplexity
                figures = f"{significant(start, 3)}{NBSP}{ARROW}{NBSP}{significant(end, 3)}"
                return f"{told}; {name} perplexity {figures} ({change(end, start)})"
        return f"{told}; no text was measured on both"

    @property
    def alone(self) -> list[str]:
        """Texts that only one model of the chain was measured on, so that nothing can be said of the chain."""
        counts = [sum(link.scores[i] is not None for link in self.links) for i in range(len(self.texts))]
        return [words for words, count in zip(self.told, counts, strict=True) if count < 2]


def summary_of(report: Report) -> EarlierRun:
    """What later runs remember of this one."""
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    zeros = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in report.layers)
    size, left = report.size, footprint(report)
    done = " + ".join(stage.label for stage in report.stages) or what_was_done(report)
    return EarlierRun(
        source=report.model.source,
        label=done if report.exported is None else f"{done}; exported as {report.exported.form}",
        stages=report.stages if len(report.stages) > 1 else [],
        version=report.tool.version,
        command=report.tool.command,
        started=report.tool.started,
        seconds=report.tool.seconds,
        source_bytes=size.source_bytes,
        output_bytes=left.weight_bytes,
        bits_per_weight_linears=left.bits_linears,
        bits_per_weight_model=left.bits_model,
        source_bits_per_weight=size.source_bits_per_weight,
        sparsity=zeros / weights if weights else 0.0,
        evaluation=[
            text.model_copy(update={"rows": [row for row in text.rows if row.who != "baseline"]})
            for text in report.evaluation
        ],
        baseline=report.baseline.verdict if report.baseline is not None else "",
    )


def chain_of(report: Report) -> Chain | None:
    """The chain that ends with this report; ``None`` where its source is an original."""
    if not report.history:
        return None
    runs = [*report.history, summary_of(report)]
    keys, texts = _texts(runs)
    first = runs[0]
    links = [
        Link(
            0,
            first.source,
            None,
            first.source_bytes,
            None,
            first.source_bits_per_weight,
            None,
            _scores(keys, None, first),
        )
    ]
    for number, run in enumerate(runs, 1):
        following = runs[number] if number < len(runs) else None
        name = following.source if following is not None else "this model"
        links.append(
            Link(
                number,
                name,
                run,
                run.output_bytes,
                run.bits_per_weight_linears,
                run.bits_per_weight_model,
                run.sparsity,
                _scores(keys, run, following),
            )
        )
    return Chain(texts, _told(texts), links)


def _texts(runs: Sequence[EarlierRun]) -> tuple[list[str], list[Evaluation]]:
    """Keys and texts of all runs: what most models were measured on first, then as the last run has them."""
    found: dict[str, Evaluation] = {}
    models: dict[str, set[int]] = {}
    for place, run in reversed(list(enumerate(runs))):
        for text in run.evaluation:
            key = comparable_key(text)
            found.setdefault(key, text)
            models.setdefault(key, set()).update(place + (row.who == "compressed") for row in text.rows)
    order = sorted(found, key=lambda key: (found[key].in_domain, -len(models[key])))
    return order, [found[key] for key in order]


def _told(texts: Sequence[Evaluation]) -> list[str]:
    names = [text.name for text in texts]
    return [
        text.name
        if names.count(text.name) == 1
        else f"{text.name} ({text.windows} windows, tokens {token_hash(text)[:8] or 'without a hash'})"
        for text in texts
    ]


def _scores(keys: Sequence[str], run: EarlierRun | None, following: EarlierRun | None) -> list[Score | None]:
    own = {comparable_key(text): row_of(text, "compressed") for text in run.evaluation} if run else {}
    later = {comparable_key(text): row_of(text, "dense") for text in following.evaluation} if following else {}
    scores: list[Score | None] = []
    for key in keys:
        ours, again = own.get(key), later.get(key)
        if ours is not None:
            scores.append(Score(ours, again=False))
        else:
            scores.append(Score(again, again=run is not None) if again is not None else None)
    return scores
