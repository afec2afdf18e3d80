"""Sections of docs/benchmarks.md: written between markers, so that every script can renew its own and no other."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
OUT = ROOT / "out" / "benchmarks"

HEAD = """# Benchmarks

Measured, never typed in: `python benchmarks/run_all.py` renews every section below between its markers, and each
script in `benchmarks/` renews its own (`python -m benchmarks.quality`, ...). Other machines give other seconds; ratios
measured in one run are what to look at.
"""


def processor() -> str:
    """The processor's own name, as far as the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else (platform.processor() or platform.machine())


def package_versions(names: Sequence[str]) -> str:
    """``name version`` of the packages that are installed, separated by commas."""
    parts = []
    for name in names:
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def machine_line(extra: str = "") -> str:
    """One line on where and when something was measured."""
    memory = psutil.virtual_memory().total / 2**30
    threads = os.environ.get("OMP_NUM_THREADS")
    facts = [
        f"{processor()}, {os.cpu_count()} cores{f' ({threads} threads used)' if threads else ''}",
        f"{memory:.0f} GiB of memory",
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
        package_versions(("torch", "transformers", "compressor")),
    ]
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return f"Measured {when} on {', '.join(facts)}{f', {extra}' if extra else ''}."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column is left-aligned, the others right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def number(value: float | None) -> str:
    """A perplexity or ratio with about four significant digits; very large ones as powers of ten."""
    if value is None:
        return "-"
    if value >= 1e5 or value != value:
        return f"{value:.1e}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}" if value >= 100 else f"{value:.2f}"


def replace_section(page: str, name: str, text: str) -> str:
    """Return ``page`` with section ``name`` holding ``text``: renewed in place, or added at the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    if begin in page and end in page:
        before, rest = page.split(begin, 1)
        return before + section + rest.split(end, 1)[1]
    return page.rstrip() + "\n\n" + section + "\n"


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Put a section into the page of results, and show it."""
    old = page.read_text(encoding="utf-8") if page.exists() else HEAD
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(replace_section(old, name, text), encoding="utf-8")
    print(text)
