"""Bytes against perplexity of every method and setting on one model: ``python -m benchmarks.pareto``.

Writes docs/pareto.html by the tool's own ``compressor compare --plot``. Models made before are kept in out/, so that an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import find_models, source_digest
from benchmarks.quality import METHODS, TARGETS, prune_stage
from benchmarks.quantization import ROWS
from benchmarks.sections import OUT, ROOT

PAGE = ROOT / "docs" / "pareto.html"


def stages() -> dict[str, dict[str, Any]]:
    """What is drawn: name -> stage."""
    targets = [target for target in TARGETS if ":" not in target]  # not every model has widths that a pattern divides
    pruned = {f"{method} {target}": prune_stage(method, target) for method in METHODS for target in targets}
    return {**{row: {"quantize": settings} for row, settings in ROWS.items()}, **pruned}


def slug(name: str) -> str:
    """The name of a folder."""
    return re.sub(r"[^a-z0-9.=+-]+", "-", name.lower()).strip("-")


def make(stage: dict[str, Any], model: Path, calibration: Path, text: Path, folder: Path) -> None:
    """Compress and evaluate on one text, unless that was done before."""
    from compressor.run.recipe import make_recipe
    from compressor.run.stream import Options, compress

    if (folder / "report.json").exists():
        return
    content = {
        "stages": [stage],
        "calibration": {"sources": [str(calibration)], "nsamples": 64, "seqlen": 256},
        "evaluation": {"texts": [str(text)], "windows": 120, "seqlen": 256, "baseline": False},
        "verify": False,
    }
    compress(make_recipe(content), str(model), Options(output=folder, fresh=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Make what is missing, then draw the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared" / "models", help="folder of models")
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared" / "text", help="calibration/, heldout/")
    parser.add_argument("--model", default="tinystories-656k", help="part of the name of the model to draw")
    parser.add_argument("--calibration", default="stories", help="which text")
    parser.add_argument("--without", nargs="*", default=[], help="parts of the names of what is not to be drawn")
    args = parser.parse_args(argv)
    models = find_models(args.models, [args.model])
    calibration, text = (args.text / part / f"{args.calibration}.jsonl" for part in ("calibration", "heldout"))
    if not models or not calibration.exists() or not text.exists():
        print(f"pareto: skipped, no model {args.model} in {args.models} or no text in {args.text}")
        return 0
    place = OUT / "pareto" / f"{models[0].name}-{source_digest()}"
    folders = []
    for name, stage in stages().items():
        if any(part in name for part in args.without):
            continue
        folder = place / slug(name)
        make(stage, models[0], calibration, text, folder)
        folders.append(str(folder))
        print(name, flush=True)
    command = [sys.executable, "-m", "compressor.cli.app", "compare", *folders, "--plot", str(PAGE)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
