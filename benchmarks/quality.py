"""Perplexity on held-out text of every pruning method at several sparsities: ``python -m benchmarks.quality``.

Every result is appended to a cache as soon as it is there, so that an interrupted benchmark goes on where it stopped.
The cache knows the source of the methods: after a change to them everything is measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
BRIEF_TARGETS = ("50%", "70%")
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


def find_models(folder: Path, only: Sequence[str] | None) -> list[Path]:
    """Model folders with a tokenizer, smallest first."""
    found = [path.parent for path in folder.glob("*/tokenizer.json") if (path.parent / "config.json").exists()]
    chosen = [path for path in found if not only or any(name in path.name for name in only)]
    return sorted(chosen, key=lambda path: sum(file.stat().st_size for file in path.glob("*.safetensors")))


def plan_jobs(models: Sequence[str], args: argparse.Namespace) -> list[Job]:
    """All jobs, so ordered that whole columns of the tables are there early."""
    jobs = []
    for model in models:
        main = args.nsamples[0]
        jobs.append(Job(model, "dense", "", main, args.seqlen, args.windows))
        brief = any(name in model for name in args.brief)
        for nsamples in args.nsamples[:1] if brief else args.nsamples:
            for target in BRIEF_TARGETS if brief else args.targets:
                for method in args.methods:
                    if nsamples == main or method in FITTED:
                        jobs.append(Job(model, method, target, nsamples, args.seqlen, args.windows))
    return jobs


def source_digest() -> str:
    """What the numbers depend on: the methods and the engine."""
    digest = hashlib.sha256()
    for folder in ("methods", "engine", "calibration"):
        for file in sorted((ROOT / "compressor" / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def measure(job: Job, model: Path, calibration: Path, texts: Sequence[Path], scratch: Path) -> dict[str, Any]:
    """Compress and evaluate what was written. Perplexities by text; seconds of the compression alone."""
    from compressor.run.judge import judge_model
    from compressor.run.recipe import make_recipe
    from compressor.run.stream import Options, compress

    began, folder = time.perf_counter(), model
    excluded: tuple[str, ...] = ()
    if job.method != "dense":
        folder = scratch / "pruned"
        shutil.rmtree(folder, ignore_errors=True)
        excluded = indivisible(json.loads((model / "config.json").read_text()), job.target)
        content = {
            "stages": [prune_stage(job.method, job.target, excluded)],
            "calibration": {"sources": [str(calibration)], "nsamples": job.nsamples, "seqlen": job.seqlen},
            "evaluation": {"texts": ["none"], "baseline": False},
            "verify": False,
        }
        compress(make_recipe(content), str(model), Options(output=folder, fresh=True))
    seconds = time.perf_counter() - began
    rows = judge_model(str(folder), texts=[str(text) for text in texts], windows=job.windows, seqlen=job.seqlen)
    perplexity = {row["name"]: row["rows"][0]["perplexity"] for row in rows}
    counts = {row["name"]: row["windows"] for row in rows}
    return {"perplexity": perplexity, "windows_of": counts, "excluded": list(excluded), "seconds": seconds}


def read_cache(path: Path) -> list[dict[str, Any]]:
    """Results so far; a line cut off by an interruption is left out."""
    results = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared" / "models", help="folder of models")
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared" / "text", help="calibration/, heldout/")
    parser.add_argument("--only", nargs="*", help="parts of the names of the models to measure")
    parser.add_argument("--calibration", default="stories", help="which calibration text")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--brief", nargs="*", default=["mix14m"], help="models to measure at 50 % and 70 % only")
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
            result = measure(job, models[job.model], calibration, texts, scratch)
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
