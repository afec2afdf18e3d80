"""One model compressed by one stage and measured on held-out text; and the cache of such results."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sections import ROOT


def source_digest(*more: str) -> str:
    """What the numbers depend on: the methods and the engine, and ``more`` files, as paths below ``compressor``."""
    digest = hashlib.sha256()
    for folder in ("methods", "engine", "calibration"):
        for file in sorted((ROOT / "compressor" / folder).glob("*.py")):
            digest.update(file.read_bytes())
    for name in more:
        digest.update((ROOT / "compressor" / name).read_bytes())
    return digest.hexdigest()[:16]


def find_models(folder: Path, only: Sequence[str] | None) -> list[Path]:
    """Model folders with a tokenizer, smallest first."""
    found = [path.parent for path in folder.glob("*/tokenizer.json") if (path.parent / "config.json").exists()]
    chosen = [path for path in found if not only or any(name in path.name for name in only)]
    return sorted(chosen, key=lambda path: sum(file.stat().st_size for file in path.glob("*.safetensors")))


def read_cache(path: Path) -> list[dict[str, Any]]:
    """Results so far; a line cut off by an interruption is left out."""
    results = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return results


def measure(
    stage: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    model: Path,
    calibration: Path,
    texts: Sequence[Path],
    scratch: Path,
    *,
    nsamples: int,
    seqlen: int,
    windows: int,
) -> dict[str, Any]:
    """Compress and evaluate what was written to disk.

    Args:
        stage: an entry of a recipe's ``stages``, or several; None for the untouched model.

    Returns:
        Perplexities and numbers of windows by text, bits per weight of the linears, the same had the source been in
        half precision, and of the model, bytes of the weight files, seconds of the compression alone.
    """
    from compressor.report.contents import read_contents
    from compressor.run.judge import judge_model
    from compressor.run.recipe import make_recipe
    from compressor.run.stream import Options, compress

    began, folder, bits = time.perf_counter(), model, None
    if stage is not None:
        folder = scratch / "compressed"
        shutil.rmtree(folder, ignore_errors=True)
        content = {
            "stages": [stage] if isinstance(stage, Mapping) else list(stage),
            "calibration": {"sources": [str(calibration)], "nsamples": nsamples, "seqlen": seqlen},
            "evaluation": {"texts": ["none"], "baseline": False},
            "verify": False,
        }
        report = compress(make_recipe(content), str(model), Options(output=folder, fresh=True))
        bits = report.size.bits_per_weight_linears
    seconds = time.perf_counter() - began
    rows = judge_model(str(folder), texts=[str(text) for text in texts], windows=windows, seqlen=seqlen)
    contents = read_contents(folder)
    return {
        "perplexity": {row["name"]: row["rows"][0]["perplexity"] for row in rows},
        "windows_of": {row["name"]: row["windows"] for row in rows},
        "bits": bits,
        "bits_half": bits_in_halves(contents.items),
        "bits_model": contents.bits(),
        "bytes": contents.weight_bytes,
        "seconds": seconds,
    }


def bits_in_halves(items: Sequence[Any]) -> float:
    """Bits per weight of a folder's linears, those that are stored whole counted in 16 bits.

    A float32 checkpoint keeps what stays whole in 32 bits beside factors in 16, which says nothing about a method.

    Args:
        items: of `compressor.report.contents`.
    """
    size = parameters = 0
    for item in items:
        if item.group in ("compressed linears", "kept linears"):
            whole = item.group == "kept linears"
            size += min(item.bytes, 2 * item.parameters) if whole else item.bytes
            parameters += item.parameters
    return 8 * size / parameters
