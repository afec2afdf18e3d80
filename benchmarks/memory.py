"""Pruning a checkpoint larger than the memory it is given: ``python -m benchmarks.memory --size-gb 4.2 --limit-gb 3``.

A checkpoint of many blocks is made, and pruned by the command line under an address-space limit well below its size;
then one with half the blocks, to show that the peak does not grow with their number.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.child import Measured, compressor_command, run_child
from benchmarks.sections import OUT, ROOT, machine_line, table, write_section
from benchmarks.synthetic import blocks_for

SAMPLES, SEQLEN = 8, 128
GROWTH = 1.10  # what a peak may differ by and still be called the same


@dataclass(frozen=True)
class Outcome:
    """One run under the limit. ``route`` is how the result was verified; empty when it was not."""

    method: str
    blocks: int
    checkpoint_bytes: int
    limit_bytes: int
    peak_bytes: int
    seconds: float
    verified: str
    problem: str


def prune(folder: Path, ids: Path, out: Path, method: str, blocks: int, limit: int) -> Outcome:
    """Prune under the limit, and say what happened."""
    command = compressor_command("prune", str(folder), "-o", str(out), "--method", method)
    command += ["--sparsity", "0.5", "--calibration", str(ids), "--nsamples", str(SAMPLES), "--seqlen", str(SEQLEN)]
    command += ["--eval", "none", "--no-baseline", "--fresh", "--overwrite", "-q"]
    command += ["--no-refit"]  # takes most of the time and no more memory
    done = run_child(command, address_space=limit, cwd=ROOT)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    verified, problem = "", _problem(done)
    if not problem:
        found = json.loads((out / "report.json").read_text())["verification"]
        verified = found["mode"] if found and found["passed"] else ""
    shutil.rmtree(out, ignore_errors=True)
    if problem:
        print(done.errors[-6000:], file=sys.stderr)
    return Outcome(method, blocks, size, limit, done.peak_bytes, done.seconds, verified, problem)


def _problem(done: Measured) -> str:
    if done.code == 0:
        return ""
    lines = [line for line in done.errors.strip().splitlines() if line.strip()]
    return f"exit code {done.code}: {lines[-1][:200] if lines else 'nothing said'}"


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """One row a run."""
    rows = [
        [
            each.method,
            str(each.blocks),
            f"{each.checkpoint_bytes / 1e9:.2f} GB",
            f"{each.limit_bytes / 1e9:.2f} GB",
            f"{each.peak_bytes / 1e9:.2f} GB",
            f"{each.peak_bytes / each.checkpoint_bytes:.2f}",
            each.verified or f"**failed**: {each.problem or 'not verified'}",
        ]
        for each in outcomes
    ]
    header = ["method", "blocks", "checkpoint", "address space", "peak RSS", "peak / checkpoint", "verified"]
    return table(header, rows)


def verdicts(outcomes: Sequence[Outcome]) -> list[str]:
    """In words: did it finish, and does the peak depend on the number of blocks."""
    sentences = []
    good = [each for each in outcomes if not each.problem and each.verified]
    if len(good) == len(outcomes):
        sentences.append("Every run finished under the limit and was verified in a fresh process under the same limit.")
    else:
        bad = ", ".join(f"{each.method} with {each.blocks} blocks" for each in outcomes if each not in good)
        sentences.append(f"**Not every run finished verified**: {bad}.")
    for method in dict.fromkeys(each.method for each in good):
        runs = sorted((each for each in good if each.method == method), key=lambda each: each.blocks)
        if len(runs) > 1:
            few, many = runs[0], runs[-1]
            ratio = many.peak_bytes / few.peak_bytes
            verdict = "does not grow" if ratio <= GROWTH else "**grows**"
            sentences.append(
                f"{method}: {many.blocks} blocks instead of {few.blocks} change the peak by x{ratio:.3f}: "
                f"it {verdict} with the number of blocks."
            )
    return sentences


def memory_section(outcomes: Sequence[Outcome], what: str) -> str:
    """The whole section."""
    return "\n\n".join(
        [
            "## Memory",
            machine_line(),
            f"`compressor prune --sparsity 0.5 --no-refit` as a process that may not map more than the given "
            f"address space, on a made-up Llama in shards ({what}); {SAMPLES} x {SEQLEN} calibration tokens. "
            "Peak RSS is the kernel's, of the largest process.",
            outcome_table(outcomes),
            "\n".join(f"- {sentence}" for sentence in verdicts(outcomes)),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Make, prune, tell, and clean up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-gb", type=float, default=4.2, help="size of the larger checkpoint")
    parser.add_argument("--limit-gb", type=float, default=3.0, help="address space of a process")
    parser.add_argument("--hidden", type=int, default=1280)
    parser.add_argument("--ffn", type=int, default=3456)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--methods", nargs="*", default=["magnitude", "sparsegpt"])
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints")
    parser.add_argument("--no-page", action="store_true", help="only print the table")
    args = parser.parse_args(argv)
    scratch = OUT / "memory"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    needed = 4 * args.size_gb * 1e9
    if (free := shutil.disk_usage(scratch).free) < needed:
        sys.exit(f"memory: {needed / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} GB are free; use --size-gb")
    blocks = blocks_for(args.size_gb * 1e9, args.hidden, args.ffn, args.vocabulary, args.dtype)
    outcomes = []
    try:
        for count in (blocks, blocks // 2):
            folder, ids = scratch / f"blocks-{count}", scratch / f"ids-{count}.npy"
            command = [sys.executable, "-m", "benchmarks.synthetic", str(folder), "--blocks", str(count)]
            command += ["--hidden", str(args.hidden), "--ffn", str(args.ffn), "--vocabulary", str(args.vocabulary)]
            command += ["--dtype", args.dtype, "--ids", str(ids), "--windows", str(SAMPLES), "--seqlen", str(SEQLEN)]
            made = run_child(command, cwd=ROOT)
            if made.code:
                sys.exit(f"memory: the checkpoint could not be made\n{made.errors}")
            for method in args.methods:
                outcomes.append(prune(folder, ids, scratch / "pruned", method, count, int(args.limit_gb * 1e9)))
                print(outcomes[-1], flush=True)
            if not args.keep:
                shutil.rmtree(folder)
    finally:
        if not args.keep:
            shutil.rmtree(scratch, ignore_errors=True)
    section = memory_section(outcomes, f"hidden size {args.hidden}, {args.dtype}")
    if args.no_page:
        print(section)
    else:
        write_section("memory", section)


if __name__ == "__main__":
    main()
