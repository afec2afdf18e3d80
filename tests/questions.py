"""Questions for tasks, some of which the embedded model can answer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Put them into a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sequences(count: int) -> list[dict[str, Any]]:
    """Which number comes next; the embedded model knows."""
    draw = random.Random(1)
    rows = []
    for _ in range(count):
        step, start = draw.randint(2, 9), draw.randint(1, 50)
        said = [start + step * place for place in range(6)]
        choices = [str(said[-1] + step), str(said[-1] + step + 1), str(said[-1] + 2), str(start)]
        draw.shuffle(choices)
        gold = choices.index(str(said[-1] + step))
        rows.append({"query": f"count by {step}: {' '.join(map(str, said))}", "choices": choices, "gold": gold})
    return rows


def stories(count: int) -> list[dict[str, Any]]:
    """Questions that are answered in words; the embedded model writes sums well."""
    draw = random.Random(2)
    rows = []
    for _ in range(count):
        have, more = draw.randint(10, 60), draw.randint(5, 30)
        query = f"Question: Flunt has {have} traivs. He buys {more} more and sells 5. How many traivs are left?\n"
        rows.append({"query": query, "answer": str(have + more - 5), "pattern": r"The answer is (\d+)"})
    return rows


def harness_task(name: str, data: Path) -> str:
    """The text of a YAML file of the harness over a file of :func:`sequences`."""
    return (
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: query\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\nnum_fewshot: 0\n"
    )
