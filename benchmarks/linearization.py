"""Linearized models: perplexity by method at equal tokens, recall beyond the window, cost of a token by context.

    python -m benchmarks.linearization [--only NAME] [--parts quality recall speed] [--tokens 300000]

Every run's result is kept in out/benchmarks/linearization.jsonl, so that an interrupted one goes on; the section of
docs/benchmarks.md is renewed at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.linearization_tables import linearization_section
from benchmarks.measuring import find_models, read_cache, source_digest
from benchmarks.recall_task import GAP, LENGTH, accuracy, train_teacher, write_texts
from benchmarks.sections import OUT, ROOT, write_section

METHODS = ("windowed", "window-sink", "lolcats", "lawcat", "liger", "lizard", "regla", "supra", "lightning")
WITH_WINDOW = ("windowed", "window-sink", "lolcats", "lawcat", "liger", "lizard")
"""Those whose recall is measured with a window of 16 tokens; the others have none."""

SMOKE = 2_000_000
RECALL_TOKENS = 2_000_000
RECALL_RATES = {"train": "full", "full_rate": 1e-3, "new_rate": 3e-3, "batch": 32}
"""A model of 100 thousand parameters is trained as a whole, and fast."""

CONTEXTS = (1024, 4096, 16384, 65536)
DECIDERS = ("run/linearize.py", "run/distillation.py", "run/keep.py", "hf/linear_attention.py")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared" / "models", help="folder of models")
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared" / "text", help="calibration/, heldout/")
    parser.add_argument("--only", nargs="*", help="parts of the names of the models to measure")
    parser.add_argument("--parts", nargs="*", default=["quality", "smoke", "recall", "speed"])
    parser.add_argument("--tokens", type=int, default=300_000, help="tokens that every method is trained on")
    parser.add_argument("--nsamples", type=int, default=512)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=40, help="windows of each held-out text")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--no-page", action="store_true", help="only print the section")
    return parser.parse_args(argv)


def linearized(model: Path, stage: Mapping[str, Any], output: Path, **sections: Any) -> Any:
    """Linearize, or go on where an interrupted run stopped, and return the report; the folder is at ``output``."""
    from compressor.run.recipe import make_recipe
    from compressor.run.stream import Options, compress

    shutil.rmtree(output, ignore_errors=True)  # of a run that had ended; one that had not is beside it
    content = {"stages": [{"linearize": dict(stage)}], "verify": False, **sections}
    return compress(make_recipe(content), str(model), Options(output=output))


def quality(model: Path, stage: Mapping[str, Any], args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Perplexity on the held-out texts, and by position where the memory can matter."""
    texts = sorted((args.text / "heldout").glob("*.jsonl"))
    report = linearized(
        model,
        stage,
        scratch / "out",
        calibration={
            "sources": [str(args.text / "calibration" / "stories.jsonl")],
            "nsamples": args.nsamples,
            "seqlen": args.seqlen,
        },
        evaluation={"texts": [str(text) for text in texts], "windows": args.windows, "baseline": False},
    )
    found = report.linearization
    return {
        "perplexity": {text.name: [row.perplexity for row in text.rows] for text in report.evaluation},
        "kl": {text.name: text.rows[1].kl for text in report.evaluation},
        "kept": found.kept,
        "scores": [] if found.selection is None else [row.score for row in found.selection.scores],
        "errors": [[row.before, row.after] for row in found.transfer],
        "seconds": report.tool.seconds,
    }


def recall(teacher: Path, stage: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Accuracy of the answers with and beyond the window, of the model, of its windows and of its memories alone."""
    from transformers import AutoModelForCausalLM

    from compressor.hf.linearized import only_parts

    report = linearized(
        teacher,
        {**RECALL_RATES, **stage},
        scratch / "out",
        calibration={"sources": [str(teacher / "train.npy")], "nsamples": 2048, "seqlen": LENGTH},
        evaluation={"texts": ["none"], "baseline": False},
    )
    model: Any = AutoModelForCausalLM.from_pretrained(scratch / "out").eval()
    parts = {"whole": [accuracy(model, gap) for gap in (0, GAP)]}
    for part in ("window", "memory"):
        with only_parts(model, part):
            parts[part] = [accuracy(model, gap) for gap in (0, GAP)]
    found = report.linearization
    scores = [] if found.selection is None else [row.score for row in found.selection.scores]
    return {"accuracy": parts, "kept": found.kept, "scores": scores, "seconds": report.tool.seconds}


def recall_teacher(folder: Path) -> Path:
    """The model that solves the task, trained once."""
    if not (folder / "train.npy").exists():
        train_teacher(folder, say=lambda words: print(words, flush=True))
        write_texts(folder / "train.npy", 2048, seed=7)
    return folder


def speed() -> dict[str, Any]:
    """Milliseconds and cache bytes of a token, and seconds of a prefill, by context; untrained, since time is all.

    Two blocks of the shapes of a model of a billion parameters, linearized and not.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    from benchmarks.linearization_speed import measure_speed

    config = LlamaConfig(
        vocab_size=1024, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=1 << 17, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config).eval()
    return measure_speed(dense, CONTEXTS)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then renew the section."""
    args = parse(argv)
    models = find_models(args.models, args.only)
    cache, scratch = OUT / "linearization.jsonl", OUT / "linearization"
    if args.fresh:
        cache.unlink(missing_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    sizes = {"nsamples": args.nsamples, "seqlen": args.seqlen, "windows": args.windows}
    common = {"source": source_digest(*DECIDERS), **sizes}
    known = {
        (r["part"], r["model"], json.dumps(r["stage"])): r for r in read_cache(cache) if common.items() <= r.items()
    }
    results = []

    def result(part: str, model: str, stage: dict[str, Any], measured: Any) -> None:
        key = (part, model, json.dumps(stage))
        if key not in known:
            folder = scratch / hashlib.sha256(json.dumps([*key, common]).encode()).hexdigest()[:12]
            known[key] = {"part": part, "model": model, "stage": stage, **common, **measured(folder)}
            shutil.rmtree(folder, ignore_errors=True)
            with cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[key]) + "\n")
            print(json.dumps(known[key])[:400], flush=True)
        results.append(known[key])

    if (args.text / "heldout").exists():
        for model in models:
            if "quality" in args.parts:
                for method in METHODS:
                    stage = {"method": method, "keep_attention": 0, "tokens": args.tokens}
                    result("quality", model.name, stage, lambda folder, m=model, s=stage: quality(m, s, args, folder))
            if "smoke" in args.parts:
                for kept in (0.25, 0):
                    stage = {"method": "windowed", "keep_attention": kept, "tokens": SMOKE}
                    result("smoke", model.name, stage, lambda folder, m=model, s=stage: quality(m, s, args, folder))
    elif args.parts != ["recall"] and args.parts != ["speed"]:
        print(f"linearization: no text in {args.text}, only recall and speed")
    if "recall" in args.parts:
        teacher = recall_teacher(OUT / "recall_teacher")
        ours = {"method": "windowed", "window": 16, "sinks": 0, "tokens": RECALL_TOKENS}
        stages: list[dict[str, Any]] = [{**ours, "keep_attention": 1}, {**ours, "keep_layers": [0]}]
        for method in METHODS:
            near = {"window": 16} if method in WITH_WINDOW else {}
            first = {"sinks": 0} if method in ("windowed", "window-sink") else {}
            stages.append({"method": method, **near, **first, "tokens": RECALL_TOKENS, "keep_attention": 0})
        for stage in stages:
            result("recall", "recall", dict(stage), lambda folder, s=stage: recall(teacher, s, folder))
    if "speed" in args.parts:
        result("speed", "2 x 2048", {}, lambda folder: speed())
    shutil.rmtree(scratch, ignore_errors=True)
    section = linearization_section(results, args.tokens, METHODS, [model.name for model in models])
    if args.no_page:
        print(section)
    else:
        write_section("linearization", section)


if __name__ == "__main__":
    main()
