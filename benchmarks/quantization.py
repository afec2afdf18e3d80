"""Loss on held-out text of every quantizing method at its true bits: ``python -m benchmarks.quantization``.

Every result is appended to a cache as soon as it is there, so that an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import find_models, measure, read_cache, source_digest
from benchmarks.quantization_tables import quantization_section
from benchmarks.sections import OUT, ROOT, write_section

ROWS: dict[str, dict[str, Any]] = {
    **{f"rtn {bits}-bit": {"method": "rtn", "bits": bits} for bits in (2, 3, 4)},
    **{f"gptq {bits}-bit": {"method": "gptq", "bits": bits} for bits in (2, 3, 4, 8)},
    **{f"awq {bits}-bit": {"method": "awq", "bits": bits} for bits in (3, 4)},
    **{f"trit-planes K={k}": {"method": "trit-planes", "planes": k} for k in (1, 2, 3)},
    **{f"trit-planes K={k} paper": {"method": "trit-planes", "planes": k, "fit": "paper"} for k in (1, 2, 3)},
    "trit-planes K=2 learned": {"method": "trit-planes", "planes": 2, "tune_steps": 200},
    **{f"gptq {bits}-bit learned": {"method": "gptq", "bits": bits, "tune_steps": 200} for bits in (2, 3, 4)},
    "pb-llm 10 %": {"method": "pb-llm"},
    "pb-llm 10 % paper": {"method": "pb-llm", "fit": "paper"},
    "pb-llm 14 % 4-bit": {"method": "pb-llm", "salient": 0.14, "salient_bits": 4},
    "pb-llm columns": {"method": "pb-llm", "mask": "column"},
    "pb-llm 10 % learned": {"method": "pb-llm", "tune_steps": 400},
    "trit-planes K=2 data-free": {"method": "trit-planes", "planes": 2, "fit": "data-free"},
    "trit-planes 3 bpw": {"method": "trit-planes", "planes": "auto", "bpw": 3.0},
    **{f"flexround {bits}-bit": {"method": "flexround", "bits": bits} for bits in (2, 3, 4)},
    **{f"gptq {bits}-bit + rank 4": {"method": "gptq", "bits": bits, "correct": 4} for bits in (2, 3, 4)},
    **{
        f"gptq {bits}-bit + rank 8 in 4 bits": {"method": "gptq", "bits": bits, "correct": 8, "correct_bits": 4}
        for bits in (2, 3, 4)
    },
    **{f"gptq 4-bit + embeddings {bits}": {"method": "gptq", "bits": 4, "embeddings": bits} for bits in (8, 4)},
    "ptq161": {"method": "ptq161"},
    "ptq161 paper": {"method": "ptq161", "fit": "paper"},
    "ptq161 learned": {"method": "ptq161", "tune_steps": 200},
    "ptq161 paper learned": {"method": "ptq161", "fit": "paper", "tune_steps": 200},
}


def is_learned(row: str) -> bool:
    """Whether blocks are learned, which takes many times longer."""
    return "tune_steps" in ROWS[row] or ROWS[row]["method"] == "flexround"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared" / "models", help="folder of models")
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared" / "text", help="calibration/, heldout/")
    parser.add_argument("--only", nargs="*", help="parts of the names of the models to measure")
    parser.add_argument("--calibration", default="stories", help="which calibration text")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--brief", nargs="*", default=["mix14m"], help="models without the rows that are learned")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=120, help="at most so many windows of each held-out text")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--no-page", action="store_true", help="only print the tables")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then renew the section."""
    args = parse(argv)
    models = find_models(args.models, args.only)
    calibration = args.text / "calibration" / f"{args.calibration}.jsonl"
    texts = sorted((args.text / "heldout").glob("*.jsonl"))
    if not models or not texts or not calibration.exists():
        print(f"quantization: skipped, no models with a tokenizer in {args.models} or no text in {args.text}")
        return
    cache, scratch = OUT / "quantization.jsonl", OUT / "quantization"
    if args.fresh:
        cache.unlink(missing_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    sizes = {"nsamples": args.nsamples, "seqlen": args.seqlen, "windows": args.windows}
    common = {"source": source_digest(), "calibration": args.calibration, **sizes}
    known = {(r["model"], r["row"]): r for r in read_cache(cache) if common.items() <= r.items()}
    results = []
    for model in models:
        brief = any(name in model.name for name in args.brief)
        for row in ("dense", *(row for row in args.rows if not (brief and is_learned(row)))):
            if (model.name, row) not in known:
                stage = None if row == "dense" else {"quantize": ROWS[row]}
                found = measure(stage, model, calibration, texts, scratch, **sizes)
                result = {"model": model.name, "row": row, **common, **found}
                with cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                known[model.name, row] = result
                print(f"{model.name} {row}: {found['bits']} bits, {found['perplexity']}", flush=True)
            results.append(known[model.name, row])
    shutil.rmtree(scratch, ignore_errors=True)
    section = quantization_section(results, args.calibration)
    if args.no_page:
        print(section)
    else:
        write_section("quantization", section)


if __name__ == "__main__":
    main()
