"""Tables and sentences of the linearization benchmark, from its results alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.quality_tables import short
from benchmarks.sections import machine_line, table

Results = Sequence[dict[str, Any]]

TARGETS = {0.25: 0.05, 0: 0.10}
"""Share of layers kept -> the most that perplexity may rise at the smoke budget."""


def linearization_section(
    results: Results, tokens: int, methods: Sequence[str] = (), models: Sequence[str] = ()
) -> str:
    """The section of docs/benchmarks.md; says which of ``methods`` and ``models`` have not been measured."""
    parts = ["## Linearization", machine_line()]
    quality = [r for r in results if r["part"] == "quality"]
    if quality:
        parts += [
            f"### Methods at equal tokens ({tokens:,}), no layer kept",
            METHODS_WORDS,
            *_by_model(quality, methods),
        ]
    smoke = [r for r in results if r["part"] == "smoke"]
    if smoke:
        parts += ["### The default at the smoke budget", *_smoke(smoke)]
        if left := [model for model in models if model not in {r["model"] for r in smoke}]:
            parts.append(f"Not measured yet: {', '.join(left)}.")
    recall = [r for r in results if r["part"] == "recall"]
    if recall:
        parts += ["### Recall beyond the window", RECALL_WORDS, *_recall(recall)]
    for result in results:
        if result["part"] == "speed":
            parts += ["### Cost of a token and of a prefill by context", *_speed(result["rows"])]
    return "\n\n".join(parts) + "\n"


METHODS_WORDS = (
    "Perplexity on held-out text as a multiple of the dense model's; trained on stories alone. `window-sink` has no "
    "memory: what does not beat it has none that is worth anything here. Texts hardly need what lies beyond the "
    "window, so this table is about what a method costs, and the recall below about what it can. "
    "What has no softmax window under the same denominator (lawcat, regla, supra, lightning; lizard adds its window to "
    "the memory) has to learn all of attention anew, and so few tokens are far from enough for that: in their papers "
    "it is 20 million and more. It is no defect of theirs: beyond the window all of them recall (below), where "
    "`window-sink` cannot."
)
RECALL_WORDS = (
    "A model of 100 thousand parameters that solves associative recall: 8 pairs, 64 tokens of filler, the 8 keys "
    "again; the window is 16 tokens, and there are no sinks, since the first tokens are pairs. Share of right answers "
    "right behind the pairs (gap 0) and beyond the window (gap 64); chance is 3 %."
)


def _by_model(results: Results, methods: Sequence[str]) -> list[str]:
    out = []
    for model in dict.fromkeys(r["model"] for r in results):
        rows = [r for r in results if r["model"] == model]
        texts = list(rows[0]["perplexity"])
        head = ["method", *(short(text) for text in texts), "mean", "KL (stories)"]
        body = []
        for row in rows:
            ratios = [row["perplexity"][text][1] / row["perplexity"][text][0] for text in texts]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            own = next(text for text in texts if short(text) == "stories")
            body.append([row["stage"]["method"], *(f"{x:.3f}" for x in [*ratios, mean]), f"{row['kl'][own]:.4f}"])
        baseline = next((row for row in rows if row["stage"]["method"] == "window-sink"), None)
        out += [f"**{model}**", table(head, body)]
        if baseline is not None:
            worse = [r["stage"]["method"] for r in rows if r is not baseline and _kl(r) >= _kl(baseline)]
            words = (
                f"no better than window-sink on stories by KL: {', '.join(worse)}" if worse else "all beat window-sink"
            )
            out.append(words[0].upper() + words[1:] + ".")
        if left := [method for method in methods if method not in {row["stage"]["method"] for row in rows}]:
            out.append(f"Not measured yet: {', '.join(left)}.")
    return out


def _kl(row: dict[str, Any]) -> float:
    return float(next(value for text, value in row["kl"].items() if short(text) == "stories"))


def _smoke(results: Results) -> list[str]:
    body = []
    for row in results:
        kept = row["stage"]["keep_attention"]
        for text, (dense, linear) in row["perplexity"].items():
            if short(text) == "stories":
                rise = linear / dense - 1
                verdict = "met" if rise <= TARGETS[kept] else "**not met**"
                layers = ", ".join(map(str, row["kept"])) or "none"
                body.append([row["model"], layers, f"{dense:.3f}", f"{linear:.3f}", f"{rise:+.1%}",
                             f"at most {TARGETS[kept]:.0%}: {verdict}", f"{row['seconds']:.0f}"])  # fmt: skip
    return [table(["model", "layers kept", "dense", "linearized", "rise", "target", "seconds"], body)]


def _recall(results: Results) -> list[str]:
    body = []
    for row in results:
        stage, found = row["stage"], row["accuracy"]
        kept = ", ".join(map(str, row["kept"])) or "none"
        cells = [f"{value:.0%}" for part in ("whole", "window", "memory") for value in found[part]]
        body.append([stage["method"], kept, *cells])
    head = ["method", "kept", "gap 0", "gap 64", "window alone, 0", "64", "memory alone, 0", "64"]
    scored = next((row for row in results if row["scores"] and "keep_layers" not in row["stage"]), None)
    words = []
    if scored is not None:
        shown = ", ".join(f"layer {i}: {score:.2f}" for i, score in enumerate(scored["scores"]))
        words = [
            f"The score that chose the layer (KL when only it has its softmax back): {shown}; kept {scored['kept']}."
        ]
    return [table(head, body), *words]


def _speed(rows: Results) -> list[str]:
    body = []
    for row in rows:
        before = "-" if row["softmax_prefill"] is None else f"{row['softmax_prefill']:.1f}"
        body.append([f"{row['context']:,}", f"{row['softmax_ms']:.1f}", f"{row['linear_ms']:.1f}", before,
                     f"{row['linear_prefill']:.1f}", f"{row['softmax_bytes'] / 1e6:.1f}",
                     f"{row['linear_bytes'] / 1e6:.2f}"])  # fmt: skip
    head = ["context", "softmax ms", "linear ms", "softmax prefill s", "linear prefill s", "softmax MB", "linear MB"]
    first, last = rows[0], rows[-1]
    flat = last["linear_ms"] / first["linear_ms"] - 1
    faster = [row["context"] for row in rows if row["linear_ms"] < row["softmax_ms"]]
    crossing = f"It is the faster one from {faster[0]:,} tokens on." if faster else "It is nowhere the faster one."
    words = (
        f"A token takes {flat:+.0%} at {last['context']:,} tokens against {first['context']:,} (target: within 10 %); "
        f"the state is the same {last['linear_bytes'] / 1e6:.2f} MB. A token of the prefill takes "
        f"{last['linear_prefill'] / last['context'] / (first['linear_prefill'] / first['context']):.2f} times as long. "
        f"{crossing}"
    )
    return ["Two blocks of the shapes of a model of a billion parameters, float32.", table(head, body), words]
