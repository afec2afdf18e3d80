"""Side by side with llm-compressor, quantizing: ``python -m benchmarks.against_quantizers``.

GPTQ and AWQ, 4 bits, symmetric, a scale for every 128 inputs (or fewer, where that does not divide a matrix); as whole
processes, in turns, given the same token ids, float32 on both sides, and judged by the same evaluator. The environment
of the other side, and how it is measured, are those of `benchmarks.against_llmcompressor`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.against_llmcompressor import (
    Subject,
    arguments,
    empty_folder,
    environment_python,
    measure,
    subjects,
    their_versions,
)
from benchmarks.against_tables import model_table, verdicts
from benchmarks.child import compressor_command
from benchmarks.sections import OUT, ROOT, machine_line, write_section

METHODS = ("gptq", "awq")
PAIRS = {f"compressor {method}": f"llm-compressor {method}" for method in METHODS}
GROUPS = (128, 64, 32)


def group_of(config: dict[str, Any]) -> str:
    """The largest group that divides the inputs of every matrix of a Llama; whole rows where none does."""
    widths = {config["hidden_size"], config["intermediate_size"]}
    return next((str(group) for group in GROUPS if not any(width % group for width in widths)), "row")


def commands(subject: Subject, args: argparse.Namespace, python: Path, out: Path) -> dict[str, list[str]]:
    """What is measured: label -> command that writes a quantized model to ``out``."""
    group = group_of(json.loads((subject.folder / "config.json").read_text(encoding="utf-8")))
    ours = compressor_command("quantize", str(subject.folder), "-o", str(out), "--bits", "4", "--group", group)
    ours += ["--calibration", str(subject.ids), "--nsamples", str(args.nsamples), "--seqlen", str(args.seqlen)]
    ours += ["--eval", "none", "--no-baseline", "--no-verify", "--fresh", "-q"]
    theirs = [str(python), str(ROOT / "benchmarks" / "llmcompressor_job.py"), str(subject.folder), str(subject.ids)]
    theirs += [str(out), "--group", group, "--dtype", args.their_dtype]
    listed: dict[str, list[str]] = {}
    for method, (mine, other) in zip(METHODS, PAIRS.items(), strict=True):
        listed |= {mine: [*ours, "--method", method], other: [*theirs, "--method", method]}
    return listed


def section(rows: Sequence[dict[str, Any]], args: argparse.Namespace, versions: str) -> str:
    """The whole section."""
    parts = [
        "## Quantizing, side by side with llm-compressor",
        machine_line(f"the other side with {versions}"),
        f"4-bit symmetric integers by GPTQ and by AWQ, each with its own defaults otherwise, {args.nsamples} x "
        f"{args.seqlen} calibration tokens, the same token ids for both; groups of {', '.join(map(str, GROUPS))} "
        "inputs, the first that divides every matrix, else whole rows; whole processes, in turns "
        f"({args.repetitions} of each). Ours computes in float32, llm-compressor in {args.their_dtype}; both "
        "save packed integers as compressed-tensors, neither verifies. Its AWQ ends in an error where there is no "
        "accelerator, unless the pinning of memory is taken out, as it was here. "
        f"Perplexity: {args.windows} windows of held-out stories, no BOS, the same evaluator for both.",
    ]
    if args.skip:
        parts.append(f"Left out, since the other side would have taken too long: {', '.join(args.skip)}.")
    for model in dict.fromkeys(row["model"] for row in rows):
        told = "\n".join(f"- {sentence}" for sentence in verdicts(rows, model, PAIRS))
        parts += [model_table(rows, model, PAIRS), told]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and renew the section."""
    parser = arguments(__doc__)
    parser.set_defaults(big=False)
    parser.add_argument("--skip", nargs="*", default=[], metavar="MODEL:METHOD", help="what would take too long")
    args = parser.parse_args(argv)
    python = environment_python(args.llmcompressor)
    scratch, rows = empty_folder("against-quantizers"), []
    for subject in subjects(args, scratch):
        out = scratch / "quantized"
        listed = commands(subject, args, python, out)
        for skipped in args.skip:
            name, _, method = skipped.partition(":")
            if name in subject.name:
                listed = {label: command for label, command in listed.items() if not label.endswith(f" {method}")}
        rows += measure(subject, args, listed, out)
    shutil.rmtree(scratch, ignore_errors=True)
    (OUT / "against_quantizers.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    text = section(rows, args, their_versions(python))
    if args.no_page:
        print(text)
    else:
        write_section("against-llm-compressor-quantization", text)


if __name__ == "__main__":
    main()
