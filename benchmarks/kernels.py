"""The kernels beside PyTorch and llama.cpp, in one run: ``python -m benchmarks.kernels [--ggml FOLDER]``.

benchmarks/ggml/CMakeLists.txt says how to build llama.cpp's part; without it there are no rows of llama.cpp. Results
are kept in out/benchmarks/kernels.jsonl until the kernels change, so that an interrupted run goes on; --fresh forgets
them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.ggml_process import Ggml
from benchmarks.kernel_tables import kernels_section
from benchmarks.measuring import read_cache
from benchmarks.sections import OUT, ROOT, write_section
from compressor.kernels.native import native

SHAPES = ("2048x2048", "4096x4096", "4096x11008")
TOKENS = (2, 4, 8, 16, 32, 128, 512)
PARTS = ("gemv", "tokens", "threads", "load", "attention", "model", "layout")
MODEL = (2048, 5632, 8, 32000)
PROMPTS = (64, 1024)
"""Tokens before those that the whole model decodes."""

MEMORY = 128 << 20  # bytes that the weights of each contender rotate through


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", type=Path, help="folder of a built benchmarks/ggml, to compare with llama.cpp")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="outputs x inputs")
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=80, help="calls of each contender")
    parser.add_argument("--steps", type=int, default=24, help="tokens that the whole model decodes")
    parser.add_argument("--note", default="", help="what to say of the machine: that it was busy")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--no-page", action="store_true", help="only print the section")
    return parser.parse_args(argv)


def digest() -> str:
    """Changes with the kernels and with how they are measured."""
    found = hashlib.sha256()
    files = [*(ROOT / "compressor" / "kernels").rglob("*.[ch]pp"), *(ROOT / "compressor" / "kernels").glob("*.py")]
    files.append(ROOT / "compressor" / "hf" / "decoding.py")
    measured = ("attention", "matrices", "model", "parts", "timing")
    for file in sorted([*files, *(ROOT / "benchmarks" / f"kernel_{name}.py" for name in measured)]):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def jobs(args: argparse.Namespace, ggml: Ggml | None) -> list[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Part, what tells a result from the others of that part, and what measures it."""
    from benchmarks import kernel_parts as parts
    from benchmarks.kernel_attention import CONTEXTS, HEADS, attention_speed
    from benchmarks.kernel_model import model_speed

    found: list[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = []
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    rounds = args.rounds
    if "gemv" in args.parts:
        for m, n in shapes:
            setup = parts.Setup(m, n, 1, 1, MEMORY, ggml)
            found.append(("gemv", {"shape": [m, n], "rounds": rounds}, partial(parts.gemv, setup, rounds)))
    if "tokens" in args.parts:
        for count in args.tokens:
            setup, few = parts.Setup(4096, 4096, count, 1, MEMORY, ggml), max(8, min(rounds, 320 // count))
            found.append(("tokens", {"tokens": count, "rounds": few}, partial(parts.tokens, setup, few)))
    if "threads" in args.parts:
        for m, n in shapes:
            setup = parts.Setup(m, n, 1, 2, MEMORY, ggml)
            found.append(
                ("threads", {"shape": [m, n], "rounds": 2 * rounds}, partial(parts.threads, setup, 2 * rounds))
            )
    if "load" in args.parts:
        for load in (0, 1, 2):
            one, two = (parts.Setup(4096, 4096, 1, count, MEMORY, wall=True) for count in (1, 2))
            what = {"load": load, "rounds": 2 * rounds}
            found.append(("load", what, partial(parts.loaded, one, two, load, 2 * rounds)))
    if "attention" in args.parts:
        for heads in HEADS:
            for context in CONTEXTS:
                what = {"heads": list(heads), "context": context, "rounds": rounds}
                setup = parts.Setup(0, 0, 1, 1, MEMORY)
                found.append(("attention", what, partial(attention_speed, setup, heads, context, rounds)))
    if "model" in args.parts:
        for prompt in PROMPTS:
            rungs = [*parts.levels(), "torch", "dense"] if prompt == PROMPTS[0] else parts.levels()[:1]
            what = {"sizes": list(MODEL), "steps": args.steps, "prompt": prompt}
            found.append(("model", what, partial(model_speed, MODEL, rungs, args.steps, prompt)))
    if "layout" in args.parts:
        found.append(("layout", {}, partial(parts.layout, 4096, 4096, 3)))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then renew the section."""
    args = parse(argv)
    os.environ["COMPRESSOR_KERNELS"], os.environ["COMPRESSOR_ACTIVATIONS"] = "auto", "int8"
    found = native()
    if found is None or not found.best:
        print(f"kernels: {'not compiled' if found is None else 'plain C++ only for this processor'}, nothing measured")
        return
    ggml = Ggml(args.ggml) if args.ggml else None
    built = None if ggml is None else f"{ggml.version} ({', '.join(ggml.features)})"
    cache = OUT / "kernels.jsonl"
    cache.parent.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        cache.unlink(missing_ok=True)
    common = {"source": digest(), "ggml": built}
    known = {json.dumps(r["job"]): r for r in read_cache(cache) if common.items() <= r.items()}
    results = []
    for part, what, measure in jobs(args, ggml):
        key = {"part": part, **what}
        if json.dumps(key) not in known:
            print(f"kernels: {key}", flush=True)
            result = {"part": part, "job": key, **common, **measure()}
            known[json.dumps(key)] = result
            with cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
        results.append(known[json.dumps(key)])
    if ggml is not None:
        ggml.close()
    section = kernels_section(results, args.note)
    if args.no_page:
        print(section)
    else:
        write_section("kernels", section)


if __name__ == "__main__":
    main()
