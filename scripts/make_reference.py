"""Write what the documentation takes from the code: ``python scripts/make_reference.py``; ``--check`` only compares.

A page of docs/ has places between ``<!-- begin KIND | ARGUMENT | ... -->`` and ``<!-- end -->``. KIND is a function of
`KINDS`; what it returns is put in between. Beside them docs/reference/recipe.schema.json is written.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from reference_api import api  # noqa: E402
from reference_numbers import numbers  # noqa: E402
from reference_settings import flags, methods, published, recipes, schema, section, settings  # noqa: E402

DOCS = ROOT / "docs"
SCHEMA = DOCS / "reference" / "recipe.schema.json"
PLACE = re.compile(r"(?m)^<!-- begin (?P<words>[^\n]*?) -->\n.*?^<!-- end -->$", re.DOTALL)
KINDS: dict[str, Callable[..., str]] = {
    "api": api,
    "flags": flags,
    "methods": methods,
    "numbers": numbers,
    "published": published,
    "recipes": recipes,
    "section": section,
    "settings": settings,
}
OTHERS = {"benchmarks.md"}
"""Pages with places of the same look that other scripts fill in."""


def filled(page: str) -> str:
    """The page with all its places renewed.

    Raises:
        KeyError: a place of a kind that there is not.
    """

    def renew(place: re.Match[str]) -> str:
        kind, *words = [word.strip() for word in place["words"].split(" | ")]
        return f"<!-- begin {place['words']} -->\n\n{KINDS[kind](*words).strip()}\n\n<!-- end -->"

    return PLACE.sub(renew, page)


def wanted() -> dict[Path, str]:
    """File -> what should stand in it, for every file that has something from the code."""
    files = {SCHEMA: json.dumps(schema(), indent=1) + "\n"}
    for path in sorted(DOCS.rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        if path.name not in OTHERS and PLACE.search(page):
            files[path] = filled(page)
    return files


def stale() -> list[Path]:
    """The files that say something else."""
    return [path for path, text in wanted().items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def main() -> None:
    """Write what is stale, or with --check only name it."""
    for path in stale():
        print(path.relative_to(ROOT))
        if "--check" in sys.argv:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted()[path], encoding="utf-8")


if __name__ == "__main__":
    main()
