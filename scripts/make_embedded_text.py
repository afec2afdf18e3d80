"""Write the embedded texts: ``calibration/embedded*.jsonl``, one JSON object a line with the field ``text``.

    python scripts/make_embedded_text.py                 # writes into calibration/
    python scripts/make_embedded_text.py --out elsewhere

A document follows from the seed, the name of its split and its number alone, so any part can be made again. The splits
share the invented world (its words and facts); the files share no document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from random import Random

from embedded_formal import code, problem, records, sequence, sums
from embedded_prose import dialogue, entry, essay, letter, story
from embedded_world import World, make_world

SEED = 20_17
Maker = Callable[[Random, World], str]
MAKERS: tuple[tuple[Maker, float], ...] = (
    (story, 0.24),
    (essay, 0.12),
    (entry, 0.16),
    (dialogue, 0.14),
    (letter, 0.05),
    (sums, 0.08),
    (sequence, 0.04),
    (problem, 0.05),
    (code, 0.07),
    (records, 0.05),
)
ARITHMETIC: tuple[tuple[Maker, float], ...] = ((sums, 0.45), (sequence, 0.2), (problem, 0.35))
# file -> (split, makers, documents)
FILES: dict[str, tuple[str, tuple[tuple[Maker, float], ...], int]] = {
    "embedded.jsonl": ("calibration", MAKERS, 1400),
    "embedded-heldout.jsonl": ("heldout", MAKERS, 350),
    "embedded-arithmetic-heldout.jsonl": ("arithmetic-heldout", ARITHMETIC, 200),
}


def document(world: World, split: str, number: int, makers: tuple[tuple[Maker, float], ...] = MAKERS) -> str:
    """Return document ``number`` of ``split``."""
    rng = Random(f"{SEED}/{split}/{number}")
    mark = rng.random()
    for maker, share in makers:
        mark -= share
        if mark < 0:
            return maker(rng, world)
    return makers[-1][0](rng, world)


def documents(world: World, split: str, number: int) -> Iterator[str]:
    """Yield the first ``number`` documents of ``split``, of all kinds."""
    return (document(world, split, index) for index in range(number))


def files(world: World) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the documents of every file. No document stands twice, in one file or in two.

    A dictionary entry is the same whenever it is drawn, so what was seen in an earlier file must be passed over.
    """
    seen: set[str] = set()
    for name, (split, makers, wanted) in FILES.items():
        kept: list[str] = []
        for number in count():
            text = document(world, split, number, makers)
            if text not in seen:
                seen.add(text)
                kept.append(text)
            if len(kept) == wanted:
                break
        yield name, kept


def jsonl(texts: Iterable[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "calibration")
    out: Path = parser.parse_args().out
    for name, texts in files(make_world(SEED)):
        (out / name).write_text(jsonl(texts), encoding="utf-8", newline="\n")
        print(f"{out / name}: {len(texts)} documents, {(out / name).stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
