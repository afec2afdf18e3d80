"""The documentation builds into a site without a warning, and the site loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from foreign import need_package

ROOT = Path(__file__).resolve().parent.parent.parent
LOADS = re.compile(
    r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)|<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="(https?:[^"]+)'
)


def test_the_site_builds_strictly_and_loads_nothing(tmp_path: Path) -> None:
    need_package("material")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pages = {str(page.relative_to(site)): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert {"index.html", "verbs/prune.html", "methods/gptq.html", "formats/nm.html"} <= pages.keys()
    assert (site / "reference" / "recipe.schema.json").exists()
    foreign = {url for text in pages.values() for found in LOADS.findall(text) for url in found if url}
    assert not foreign


def test_what_is_loaded_from_elsewhere_would_be_noticed() -> None:
    assert LOADS.findall('<link rel="stylesheet" href="https://fonts.example/css">')
    assert LOADS.findall('<script async src="https://example.org/x.js">')
