"""Every benchmark, one after the other, into docs/benchmarks.md: ``python benchmarks/run_all.py [NAME ...]``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    "quality",
    "quantization",
    "decomposition",
    "linearization",
    "pareto",
    "against_llmcompressor",
    "against_quantizers",
    "kernels",
    "solver",
    "whitening",
    "memory",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named benchmarks, or all; the number of those that failed."""
    names = list(sys.argv[1:] if argv is None else argv) or list(SCRIPTS)
    unknown = [name for name in names if name not in SCRIPTS]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r} (known: {', '.join(SCRIPTS)})", file=sys.stderr)
        return 2
    failed = 0
    for name in names:
        if not (ROOT / "benchmarks" / f"{name}.py").exists():
            continue
        print(f"== {name}", flush=True)
        failed += bool(subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT, check=False).returncode)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
