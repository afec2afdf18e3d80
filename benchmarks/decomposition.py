"""Loss on held-out text of every decomposing method, beside integers: ``python -m benchmarks.decomposition``.

Every result is appended to a cache as soon as it is there, so that an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.decomposition_tables import SHARES, decomposition_section
from benchmarks.measuring import find_models, measure, read_cache, source_digest
from benchmarks.sections import OUT, ROOT, write_section

KINDS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "asvd": {"method": "asvd"},
    "svd-llm paper": {"method": "svd-llm", "fit": "paper"},
    "svd-llm paper, refit": {"method": "svd-llm", "fit": "paper", "refit": True},
    "svd-llm uniform": {"method": "svd-llm", "ranks": "uniform"},
    "svd-llm energy": {"method": "svd-llm"},
    "svd-llm welore": {"method": "svd-llm", "ranks": "welore"},
    "dobi": {"method": "dobi"},
    "dobi paper": {"method": "dobi", "fit": "paper"},
    "svd-llm energy, 8-bit factors": {"method": "svd-llm", "factor_bits": 8},
}
"""Settings of the methods, which are run at every share of ``SHARES``."""

SAME_BYTES = 0.26
"""Of the parameters in 16 bits: what codes of 4 bits and their scales take."""

GPTQ_BITS = (2, 3, 4, 5, 6, 8)

Stages = list[dict[str, Any]]


def decomposed(kind: str, share: int) -> dict[str, Any]:
    """The stage of a method at a share (percent) of the parameters."""
    return {"decompose": {**KINDS[kind], "keep_params": share / 100}}


def quantized(bits: int) -> dict[str, Any]:
    """The stage of integers in groups of 128."""
    return {"quantize": {"method": "gptq", "bits": bits, "group": 128}}


ROWS: dict[str, Stages] = {
    **{f"gptq {bits}-bit": [quantized(bits)] for bits in GPTQ_BITS},
    **{f"{kind} {share} %": [decomposed(kind, share)] for share in SHARES for kind in KINDS},
    **{
        f"svd-llm energy {share} %, then gptq 4-bit": [decomposed("svd-llm energy", share), quantized(4)]
        for share in SHARES
    },
    "svd-llm energy, 4-bit factors 26 %": [
        {"decompose": {"method": "svd-llm", "factor_bits": 4, "keep_params": SAME_BYTES}}
    ],
}

BRIEF = (
    *(f"gptq {bits}-bit" for bits in (3, 4, 8)),
    *(f"svd-llm {kind} {share} %" for share in (80, 60) for kind in ("paper", "energy")),
)
"""Rows of the models that take minutes a row."""

DECIDERS = tuple(f"run/{name}.py" for name in ("decompose", "rank_survey", "ranks", "gates"))
"""What chooses ranks, beside the methods and the engine: results depend on it."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared" / "models", help="folder of models")
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared" / "text", help="calibration/, heldout/")
    parser.add_argument("--only", nargs="*", help="parts of the names of the models to measure")
    parser.add_argument("--calibration", default="stories", help="which calibration text")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--brief", nargs="*", default=["mix14m"], help="models with a few rows only")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=120, help="at most so many windows of each held-out text")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--no-page", action="store_true", help="only print the tables")
    return parser.parse_args(argv)


def rows_of(model: str, rows: Sequence[str], brief: Sequence[str]) -> list[str]:
    """The rows to measure of a model, the untouched model first."""
    few = any(name in model for name in brief)
    return ["dense", *(row for row in rows if not few or row in BRIEF)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then renew the section."""
    args = parse(argv)
    models = find_models(args.models, args.only)
    calibration = args.text / "calibration" / f"{args.calibration}.jsonl"
    texts = sorted((args.text / "heldout").glob("*.jsonl"))
    if not models or not texts or not calibration.exists():
        print(f"decomposition: skipped, no models with a tokenizer in {args.models} or no text in {args.text}")
        return
    cache, scratch = OUT / "decomposition.jsonl", OUT / "decomposition"
    if args.fresh:
        cache.unlink(missing_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    sizes = {"nsamples": args.nsamples, "seqlen": args.seqlen, "windows": args.windows}
    common = {"source": source_digest(*DECIDERS), "calibration": args.calibration, **sizes}
    known = {
        (r["model"], r["row"], json.dumps(r["stages"])): r for r in read_cache(cache) if common.items() <= r.items()
    }
    results = []
    for model in models:
        for row in rows_of(model.name, args.rows, args.brief):
            stages = ROWS.get(row)
            key = (model.name, row, json.dumps(stages))
            if key not in known:
                found = measure(stages, model, calibration, texts, scratch, **sizes)
                result = {"model": model.name, "row": row, "stages": stages, **common, **found}
                with cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                known[key] = result
                told = {text: round(value, 3) for text, value in found["perplexity"].items()}
                print(f"{model.name} {row}: {found['bits']} bits, {told}, {found['seconds']:.0f} s", flush=True)
            results.append(known[key])
    shutil.rmtree(scratch, ignore_errors=True)
    section = decomposition_section(results, args.calibration)
    if args.no_page:
        print(section)
    else:
        write_section("decomposition", section)


if __name__ == "__main__":
    main()
