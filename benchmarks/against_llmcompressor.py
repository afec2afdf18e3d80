"""Side by side with llm-compressor: ``python -m benchmarks.against_llmcompressor``.

Both prune half of every decoder projection by SparseGPT, as whole processes, in turns (A B A B ...), given the same
token ids; both results are measured by the same evaluator. llm-compressor lives in a virtual environment of its own,
made at the first run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.against_tables import OURS, THEIRS, against_section
from benchmarks.child import Measured, compressor_command, run_child
from benchmarks.quality import find_models
from benchmarks.sections import OUT, ROOT, write_section

ENVIRONMENT = ROOT / ".benchvenv"
TORCH = "torch==2.13.0"
SPARSITY = "0.5"
BIG = {"--blocks": "12", "--hidden": "768", "--ffn": "2048", "--vocabulary": "32000", "--dtype": "bfloat16"}


@dataclass(frozen=True)
class Subject:
    """A model, the tokens it is calibrated on, and the text it is judged on (``None``: only time and memory count)."""

    name: str
    folder: Path
    ids: Path
    text: Path | None


def environment_python(requirement: str) -> Path:
    """Python of the virtual environment with llm-compressor in it, made when it is not there yet."""
    python = ENVIRONMENT / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    probe = [str(python), "-c", "import llmcompressor"]
    if not python.exists() or subprocess.run(probe, capture_output=True, check=False).returncode:
        print(f"making {ENVIRONMENT.name} with {TORCH} and {requirement}", flush=True)
        venv.create(ENVIRONMENT, with_pip=True)
        for package in (TORCH, requirement):  # torch first and pinned, so that no other build of it is drawn in
            subprocess.run([str(python), "-m", "pip", "install", "-q", package], check=True)
    return python


def their_versions(python: Path) -> str:
    """Versions on the other side."""
    code = (
        "from importlib.metadata import version as v;"
        "print(', '.join(f'{n} {v(n)}' for n in ('llmcompressor', 'torch', 'transformers')))"
    )
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def subjects(args: argparse.Namespace, scratch: Path) -> list[Subject]:
    """The shared models that are there, and the big one that is made."""
    found = []
    calibration, heldout = args.text / "calibration" / "stories.jsonl", args.text / "heldout" / "stories.jsonl"
    for folder in find_models(args.models, args.only) if calibration.exists() else ():
        ids = scratch / f"{folder.name}.npy"
        command = [sys.executable, "-m", "benchmarks.token_windows", str(folder), str(calibration), str(ids)]
        checked(run_child([*command, "--nsamples", str(args.nsamples), "--seqlen", str(args.seqlen)], cwd=ROOT))
        found.append(Subject(folder.name, folder, ids, heldout))
    if args.big and not (args.only and not any(part in "made-up Llama" for part in args.only)):
        folder, ids = scratch / "big", scratch / "big.npy"
        command = [sys.executable, "-m", "benchmarks.synthetic", str(folder), *chain.from_iterable(BIG.items())]
        command += ["--ids", str(ids), "--windows", str(args.nsamples), "--seqlen", str(args.seqlen)]
        checked(run_child(command, cwd=ROOT))
        found.append(Subject("made-up Llama, 134 M", folder, ids, None))
    return found


def commands(subject: Subject, args: argparse.Namespace, python: Path, out: Path) -> dict[str, list[str]]:
    """What is measured: label -> command that writes a pruned model to ``out``."""
    prune = compressor_command("prune", str(subject.folder), "-o", str(out), "--method", "sparsegpt")
    prune += ["--sparsity", SPARSITY, "--calibration", str(subject.ids), "--nsamples", str(args.nsamples)]
    prune += ["--seqlen", str(args.seqlen), "--eval", "none", "--no-baseline", "--fresh", "-q"]
    job = [str(python), str(ROOT / "benchmarks" / "llmcompressor_job.py"), str(subject.folder), str(subject.ids)]
    return {
        OURS[0]: [*prune, "--no-refit", "--no-verify"],
        THEIRS: [*job, str(out), "--sparsity", SPARSITY, "--dtype", args.their_dtype],
        OURS[1]: [*prune, "--refit"],
    }


def checked(done: Measured) -> Measured:
    """Pass on what went well; end the benchmark with the command's own words otherwise."""
    if done.code:
        sys.exit(f"{Path(sys.argv[0]).stem}: a command failed with exit code {done.code}\n{done.errors[-4000:]}")
    return done


def perplexity(folder: Path, text: Path, args: argparse.Namespace) -> float:
    """By our evaluator, for either side's folder: not overlapping windows, no BOS."""
    command = compressor_command("evaluate", str(folder), "--text", str(text), "--windows", str(args.windows))
    done = checked(run_child([*command, "--seqlen", str(args.seqlen), "--json"], cwd=ROOT))
    return float(json.loads(done.output)[0]["rows"][0]["perplexity"])


def measure(
    subject: Subject, args: argparse.Namespace, commands: Mapping[str, Sequence[str]], out: Path
) -> list[dict[str, Any]]:
    """All repetitions of all commands (label -> what writes a model to ``out``) in turns; one row each.

    The made-up model takes minutes and is run once.
    """
    rows = []
    for repetition in range(args.repetitions if subject.text is not None else 1):
        for label, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            done = checked(run_child(command, cwd=ROOT))
            value = perplexity(out, subject.text, args) if subject.text is not None and repetition == 0 else None
            facts = {k: v for k, v in asdict(done).items() if k not in ("output", "errors", "code")}
            rows.append({"model": subject.name, "tool": label, "repetition": repetition, "perplexity": value, **facts})
            print(f"{subject.name}, {label}: {done.seconds:.1f} s, {done.peak_bytes / 1e6:.0f} MB, {value}", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    return rows


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all comparisons have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared" / "models", help="folder of models")
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared" / "text", help="calibration/, heldout/")
    parser.add_argument("--only", nargs="*", help="parts of the names of the models to measure")
    parser.add_argument(
        "--big", action=argparse.BooleanOptionalAction, default=True, help="the made-up 134 M model too"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=120)
    parser.add_argument(
        "--llmcompressor", default="llmcompressor", help="requirement to install, e.g. llmcompressor==X"
    )
    parser.add_argument(
        "--their-dtype", default="float32", help="what llm-compressor computes in; auto: the model's own"
    )
    parser.add_argument("--no-page", action="store_true", help="only print the tables")
    return parser


def empty_folder(name: str) -> Path:
    """A new folder for what is written in between."""
    scratch = OUT / name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    return scratch


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and renew the section."""
    args = arguments(__doc__).parse_args(argv)
    python = environment_python(args.llmcompressor)
    scratch, rows = empty_folder("against"), []
    for subject in subjects(args, scratch):
        out = scratch / "pruned"
        rows += measure(subject, args, commands(subject, args, python, out), out)
    shutil.rmtree(scratch, ignore_errors=True)
    (OUT / "against.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    setting = f"{args.nsamples} x {args.seqlen} calibration tokens"
    section = against_section(rows, setting, their_versions(python), args.windows, args.their_dtype)
    if args.no_page:
        print(section)
    else:
        write_section("against-llm-compressor", section)


if __name__ == "__main__":
    main()
