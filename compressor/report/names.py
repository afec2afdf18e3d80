"""Names of tensors for people: their order, and one line for many blocks that look alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key under which ``layers.2`` stands before ``layers.10``."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def block_index(name: str) -> int | None:
    """The first number in a dotted name, which is the decoder block's; ``None`` outside the blocks."""
    found = NUMBER.search(name)
    return int(found.group()) if found else None


def fold_names(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Fold names that differ in numbers only: ``[("model.layers.{0..31}.self_attn.q_proj", [the 32 names]), ...]``.

    Exact: the folded text stands for precisely the names listed with it. First appearance sets the order.
    """
    templates: dict[str, dict[tuple[int, ...], str]] = {}
    for name in names:
        numbers = tuple(int(number) for number in NUMBER.findall(name))
        templates.setdefault(NUMBER.sub("{}", name.replace("{", "{{").replace("}", "}}")), {})[numbers] = name
    folded = []
    for template, members in templates.items():
        for columns in _boxes(sorted(members)):
            names_of_box = [name for numbers, name in members.items() if _inside(numbers, columns)]
            folded.append((template.format(*(_ranges(column) for column in columns)), names_of_box))
    return folded


def _inside(numbers: Sequence[int], columns: Sequence[Sequence[int]]) -> bool:
    return all(number in column for number, column in zip(numbers, columns, strict=True))


def _boxes(tuples: Sequence[tuple[int, ...]]) -> list[list[list[int]]]:
    """Split a sorted set of index tuples into products of index sets: firsts with equal rests go together."""
    if not tuples or not tuples[0]:
        return [[]]
    rests: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in tuples:
        rests.setdefault(first, []).append(tuple(rest))
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, rest_of_first in rests.items():
        alike.setdefault(tuple(rest_of_first), []).append(first)
    return [[firsts, *box] for rest, firsts in alike.items() for box in _boxes(rest)]


def _ranges(numbers: Sequence[int]) -> str:
    """``[3]`` -> ``3``; ``[0, 1, 2, 5]`` -> ``{0..2,5}``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
