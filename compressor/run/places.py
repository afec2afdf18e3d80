"""Paths as they are shown to others: without the folders they lie in, and yet each one told apart from the rest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

HOMES = re.compile(r"^/(?:home|Users|var/home)/[^/]+|^/root(?=/|$)|^[A-Za-z]:[/\\]+Users[/\\]+[^/\\]+")
"""Folders of people: what is above a name in them is nobody's business."""


def shortened(paths: Iterable[str], taken: Iterable[str] = ()) -> Mapping[str, str]:
    """Return absolute path -> its last part, with as many of the folders before it as tell it from the other paths.

    Nothing down to a person's home folder is ever shown; where only that tells two paths apart they are numbered.

    Args:
        taken: words that stand beside the paths and must not look like one.
    """
    parts = {path: _parts(path) for path in dict.fromkeys(paths)}
    words, shown = set(taken), {}
    for path, mine in parts.items():
        others = [other for other in parts.values() if other != mine]
        for count in range(1, len(mine) + 1):
            tail = mine[-count:]
            shown[path] = "/".join(tail)
            if shown[path] not in words and all(other[-count:] != tail for other in others):
                break
    alike, seen = Counter(shown.values()), Counter(words)
    for path, text in shown.items():
        if alike[text] > 1 or text in words:
            seen[text] += 1
            shown[path] = f"{text} ({seen[text]})"
    return shown


def _parts(path: str) -> list[str]:
    """The parts of an absolute path below the root, or below the home folder that it lies in."""
    home = str(Path.home()).rstrip("/")
    inside = path.removeprefix(home) if f"{path}/".startswith(f"{home}/") else HOMES.sub("", path)
    return [part for part in re.split(r"[/\\]+", inside) if part and not part.endswith(":")] or ["~"]
