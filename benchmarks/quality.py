"""Perplexity on held-out text of every pruning method at several sparsities: ``python -m benchmarks.quality``.

Every result is appended to a cache as soon as it is there, so that an interrupted benchmark goes on where it stopped.
The cache knows the source of the methods: after a change to them everything is measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import find_models, measure, read_cache, source_digest
from benchmarks.quality_tables import quality_section
from benchmarks.sections import OUT, ROOT, write_section

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "refit": False},
    "magnitude+refit": {"method": "magnitude", "refit": True},
    "wanda": {"method": "wanda", "refit": False},
    "wanda+refit": {"method": "wanda", "refit": True},
    "sparsegpt": {"method": "sparsegpt", "refit": False},
    "sparsegpt+refit": {"method": "sparsegpt", "refit": True},
    "admm": {"method": "admm"},
}
TARGETS = ("50%", "60%", "70%", "2:4", "4:8")
# More calibration text for the methods that fit weights to it, to see what is fitted too closely.
FITTED = ("sparsegpt", "sparsegpt+refit", "admm")


@dataclass(frozen=True)
class Job:
    """One compressed model (``method`` is ``dense`` for the untouched one), measured on every text."""

    model: str
    method: str
    target: str
    nsamples: int
    seqlen: int
    windows: int


def prune_stage(method: str, target: str, exclude: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe's stage for a row and a column of the tables."""
    amount = {"pattern": target} if ":" in target else {"sparsity": float(target.rstrip("%")) / 100}
    return {"prune": {**METHODS[method], **amount, "exclude": list(exclude)}}


def indivisible(config: dict[str, Any], target: str) -> tuple[str, ...]:
    """Regexes of the linears of a Llama whose inputs an N:M pattern does not divide."""
    if ":" not in target or config["intermediate_size"] % int(target.split(":")[1]) == 0:
        return ()
    return (r"\.down_proj$",)


def plan_jobs(models: Sequence[str], args: argparse.Namespace) -> list[Job]:
    """All jobs, so ordered that whole columns of the tables are there early."""
    jobs = []
    for model in models:
        main = args.nsamples[0]
        jobs.append(Job(model, "dense", "", main, args.seqlen, args.windows))
        brief = any(name in model for name in args.brief)
        for nsamples in args.nsamples[:1] if brief else args.nsamples:
            for target in args.targets:
                for method in args.methods:
                    if nsamples == main or method in FITTED:
                        jobs.append(Job(model, method, target, nsamples, args.seqlen, args.windows))
    return jobs


def measured(job: Job, model: Path, calibration: Path, texts: Sequence[Path], scratch: Path) -> dict[str, Any]:
    """Compress and evaluate one job."""
    excluded = indivisible(json.loads((model / "config.json").read_text()), job.target)
    stage = None if job.method == "dense" else prune_stage(job.method, job.target, excluded)
    sizes = {"nsamples": job.nsamples, "seqlen": job.seqlen, "windows": job.windows}
    return {**measure(stage, model, calibration, texts, scratch, **sizes), "excluded": list(excluded)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared" / "models", help="folder of models")
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared" / "text", help="calibration/, heldout/")
    parser.add_argument("--only", nargs="*", help="parts of the names of the models to measure")
    parser.add_argument("--calibration", default="stories", help="which calibration text")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--brief", nargs="*", default=["mix14m"], help="models for the first of --nsamples only")
    parser.add_argument("--nsamples", nargs="*", type=int, default=[64, 128], help="the first is the main one")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=120, help="at most so many windows of each held-out text")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--no-page", action="store_true", help="only print the tables")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then renew the section."""
    args = parse(argv)
    models = {path.name: path for path in find_models(args.models, args.only)}
    calibration = args.text / "calibration" / f"{args.calibration}.jsonl"
    texts = sorted((args.text / "heldout").glob("*.jsonl"))
    if not models or not texts or not calibration.exists():
        print(f"quality: skipped, no models with a tokenizer in {args.models} or no text in {args.text}")
        return
    cache, scratch = OUT / "quality.jsonl", OUT / "quality"
    if args.fresh:
        cache.unlink(missing_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    source = {"source": source_digest(), "calibration": args.calibration}
    jobs = plan_jobs(list(models), args)
    known = {json.dumps(r["job"], sort_keys=True): r for r in read_cache(cache) if source.items() <= r.items()}
    results = []
    for count, job in enumerate(jobs, 1):
        key = json.dumps(asdict(job), sort_keys=True)
        if key not in known:
            result = measured(job, models[job.model], calibration, texts, scratch)
            known[key] = {"job": asdict(job), **source, **result}
            with cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[key]) + "\n")
            first = {name: round(value, 3) for name, value in result["perplexity"].items()}
            what = f"{job.model} {job.method} {job.target} x{job.nsamples}"
            print(f"[{count}/{len(jobs)}] {what}: {result['seconds']:.1f} s {first}", flush=True)
        results.append(known[key])
    shutil.rmtree(scratch, ignore_errors=True)
    section = quality_section(results, args.calibration)
    if args.no_page:
        print(section)
    else:
        write_section("quality", section)


if __name__ == "__main__":
    main()
