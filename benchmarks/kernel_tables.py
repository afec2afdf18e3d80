"""Tables and verdicts of the kernels' benchmark, from its results alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.kernel_attention import OURS, TORCH_ATTENTION
from benchmarks.kernel_matrices import DENSE, LOW_RANK, PARTIAL, PLANES, SPARSE
from benchmarks.kernel_model import FLOOR, ORIGINAL, OWN
from benchmarks.kernel_parts import INT4PACK, Q4, READ, TORCH, TORCH_FP32
from benchmarks.kernel_timing import quantile, times_faster
from benchmarks.sections import machine_line, table

Row = dict[str, Any]
Results = Sequence[dict[str, Any]]

PARTS = ("gemv", "tokens", "threads", "load", "attention", "model", "layout")

RIVALS = {"torch bf16": (TORCH, None), "own bf16": (DENSE, "best"), "int4pack": (INT4PACK, None), "Q4_0": (Q4, None)}
"""Column -> the row whose time is divided by, and its instruction set."""

Goal = tuple[float, float, float]
"""Floor, target and stretch."""

TOKEN_GOALS: dict[int, Goal] = {8: (2, 3, 5), 32: (1.7, 2.2, 2.5), 512: (1, 1.7, 1.9)}


def kernels_section(results: Results, note: str = "") -> str:
    """The section of docs/benchmarks.md; ``note`` is said of the machine."""
    by = {part: [r for r in results if r["part"] == part] for part in PARTS}
    llama = next((r["ggml"] for r in results if r.get("ggml")), None)
    extra = [*([f"llama.cpp's ggml {llama}"] if llama else []), *([note] if note else [])]
    parts = ["## Kernels", machine_line(", ".join(extra)), WORDS]
    verdicts = goals(by)
    if verdicts:
        parts += ["### Targets", "\n".join(f"- {line}" for line in verdicts)]
    if by["gemv"]:
        parts.append("### One token, one thread")
        for result in by["gemv"]:
            parts += [f"**{_shape(result)}**", gemv_table(result)]
    if by["tokens"]:
        parts += ["### Several tokens, one thread", TOKENS_WORDS, tokens_table(by["tokens"])]
    if by["threads"]:
        parts += ["### One token, two threads", THREADS_WORDS, threads_table(by["threads"])]
    if by["load"]:
        parts += ["### Two threads on a busy machine", LOAD_WORDS, load_table(by["load"])]
    if by["attention"]:
        parts += ["### Attention of one token, one thread", ATTENTION_WORDS, attention_table(by["attention"])]
    if by["model"]:
        parts += ["### A whole model", *_models(by["model"])]
    for result in by["layout"]:
        parts += ["### Laying a stored matrix out", *_layout(result)]
    return "\n\n".join(parts) + "\n"


WORDS = (
    "Weights rotate through copies larger than the cache, made four times in other memory, since speeds depend on "
    "where it lies; all rows of a table are timed in turns, of three calls the third, and a ratio is the median over "
    "rounds of the ratio within a round. One thread: processor time of the "
    "thread, 25th percentile and median; what takes more than 15 ms takes part in a quarter of the rounds. `own bf16` "
    "is the dense matrix in bf16 by the same kernels (`vdpbf16ps`), and the baseline that counts: PyTorch's own bf16 "
    "product is slow on this processor. Activations in bf16, rounded to 8 bits unless `exact`. llama.cpp is built for "
    "this processor, without OpenMP, and timed in its own process, in the same rounds. GB/s: bytes of the layout in "
    "10^9 by the 25th percentile; their share of the plain read is one within rounds."
)
TOKENS_WORDS = "4096 x 4096: milliseconds at the 25th percentile, and how many times faster than PyTorch's bf16."
THREADS_WORDS = (
    "Wall time in microseconds: 5th percentile and median. Whatever else the machine does is in the median, so ratios "
    "are of the 5th percentiles."
)
LOAD_WORDS = (
    "Wall time of two trit planes and of PyTorch's bf16 on one thread and on two, medians in microseconds, while other "
    "processes of the same priority compute. A ratio above 1: two threads are slower than one."
)


def _shape(result: dict[str, Any]) -> str:
    return " x ".join(map(str, result["shape"]))


def pick(result: dict[str, Any], name: str, level: str | None = None, exact: bool = False) -> Row | None:
    """The row of a name; with level "best" that of the first instruction set."""
    for row in result["rows"]:
        if row["name"] == name and level in (None, "best", row.get("level")) and row.get("exact", False) == exact:
            return dict(row)
    return None


def ratio(row: Row | None, other: Row | None) -> float | None:
    """How many times faster ``row`` is than ``other``, if both were measured."""
    return None if row is None or other is None else times_faster(row, other)


def share_of_read(result: dict[str, Any], row: Row) -> float | None:
    """Bytes a second as a share of the plain read's, by round."""
    read = pick(result, READ)
    return None if read is None else times_faster(row, read) * row["bytes"] / read["bytes"]


def times(value: float | None) -> str:
    """A ratio as text."""
    return "-" if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    """A share as text."""
    return "-" if value is None else f"{100 * value:.0f} %"


def label(row: Row) -> str:
    """Name, instruction set, mode."""
    kind = "own bf16" if row["name"] == DENSE else row["name"]
    return ", ".join([kind, *([row["level"]] if "level" in row else []), *(["exact"] if row.get("exact") else [])])


def _rivals(result: dict[str, Any]) -> dict[str, Row]:
    found = {column: pick(result, *which) for column, which in RIVALS.items()}
    return {column: row for column, row in found.items() if row is not None}


def gemv_table(result: dict[str, Any]) -> str:
    """All rows of one shape."""
    m, n = result["shape"]
    rivals = _rivals(result)
    body = []
    for row in result["rows"]:
        fast = quantile(row, 0.25)
        body.append(
            [label(row), "-" if row["name"] == READ else f"{8 * row['bytes'] / (m * n):.2f}", f"{1e6 * fast:.0f}",
             f"{1e6 * quantile(row, 0.5):.0f}", f"{row['bytes'] / fast / 1e9:.1f}",
             percent(share_of_read(result, row)),
             *("-" if row["name"] == READ else times(ratio(row, rival)) for rival in rivals.values())]
        )  # fmt: skip
    head = ["", "bits a weight", "us (25 %)", "us (median)", "GB/s", "of read", *(f"vs {name}" for name in rivals)]
    return table(head, body)


def tokens_table(results: Results) -> str:
    """Rows by kernel, columns by number of tokens."""
    body = []
    for row in results[0]["rows"]:
        cells = [label(row)]
        for result in results:
            found = pick(result, row["name"], row.get("level"), row.get("exact", False))
            if found is None:
                cells.append("-")
                continue
            cells.append(f"{1e3 * quantile(found, 0.25):.2f} ({times(ratio(found, pick(result, TORCH)))})")
        body.append(cells)
    return table(["tokens", *(str(result["tokens"]) for result in results)], body)


def threads_table(results: Results) -> str:
    """Rows by kernel and shape."""
    body = []
    rivals = list(_rivals(results[0]))
    for result in results:
        found = _rivals(result)
        read = pick(result, READ)
        for row in result["rows"]:
            least = quantile(row, 0.05)
            share = None if read is None else row["bytes"] / read["bytes"] * quantile(read, 0.05) / least
            others = [None if row["name"] == READ else quantile(found[name], 0.05) / least for name in rivals]
            body.append(
                [f"{_shape(result)}: {label(row)}", f"{1e6 * least:.0f}", f"{1e6 * quantile(row, 0.5):.0f}",
                 percent(share), *map(times, others)]
            )  # fmt: skip
    return table(["", "us (5 %)", "us (median)", "of read", *(f"vs {name}" for name in rivals)], body)


def two_by_one(result: dict[str, Any], name: str) -> tuple[float, float]:
    """Median seconds on one thread and on two."""
    one, two = (
        next(row for row in result["rows"] if row["name"] == name and row["threads"] == count) for count in (1, 2)
    )
    return quantile(one, 0.5), quantile(two, 0.5)


def load_table(results: Results) -> str:
    """Rows by number of busy processes."""
    body = []
    for result in results:
        cells = [str(result["load"])]
        for name in (PLANES, TORCH):
            one, two = two_by_one(result, name)
            cells += [f"{1e6 * one:.0f}", f"{1e6 * two:.0f}", f"{two / one:.2f}"]
        body.append(cells)
    names = [f"{name}, {what}" for name in (PLANES, TORCH) for what in ("1 thread", "2 threads", "2 / 1")]
    return table(["busy processes", *names], body)


ATTENTION_WORDS = (
    "One layer's attention of a token with all before it, in bf16; keys and values rotate through copies larger than "
    "the cache, in turns. Microseconds (25th percentile), and GB/s of keys and values. `torch`: "
    "scaled_dot_product_attention, as transformers calls it."
)


def attention_table(results: Results) -> str:
    """A line for every shape of heads and length of text."""
    levels = [row["level"] for row in results[0]["rows"] if row["name"] == OURS]
    body = []
    for result in results:
        heads, kv, width = result["heads"]
        theirs = pick(result, TORCH_ATTENTION)
        assert theirs is not None
        cells = [f"{heads} / {kv} x {width}", str(result["context"]), f"{1e6 * quantile(theirs, 0.25):.0f}"]
        for level in levels:
            row = pick(result, OURS, level)
            assert row is not None
            seconds = quantile(row, 0.25)
            cells += [f"{1e6 * seconds:.0f}", f"{row['bytes'] / seconds / 1e9:.1f}", times(ratio(row, theirs))]
        body.append(cells)
    head = ["heads / of keys x width", "tokens before", "torch"]
    return table([*head, *(name for level in levels for name in (f"{level}", "GB/s", "vs torch"))], body)


def _models(results: Results) -> list[str]:
    hidden, ffn, layers, vocabulary = results[0]["sizes"]
    words = (
        f"transformers, a Llama of {results[0]['weights'] / 1e6:.0f} million weights in linear layers (hidden size "
        f"{hidden}, {ffn}, {layers} blocks, vocabulary {vocabulary}), two random trit planes in all of them, the "
        "output layer included; bf16, eager, batch of 1, one thread. Attention, norms and cache are transformers' own "
        f"in the original alone; `{OWN}` multiplies it by our bf16 product, `{FLOOR}` gives zeros for all linear "
        "layers: what is left is framework, attention and norms. Milliseconds of processor time, 25th percentile and "
        "median of a token."
    )
    made = [f"{row['name']}: {row['made']}" for row in results[0]["rows"] if row["made"]]
    return [words, *map(_model, results), "In the log: " + "; ".join(made) + "."]


def _model(result: dict[str, Any]) -> str:
    by = {row["name"]: row for row in result["rows"]}
    labels, body = {ORIGINAL: "the original in bf16", OWN: OWN, FLOOR: FLOOR}, []
    for name, row in by.items():
        what, prefill = labels.get(name, f"trit planes, {name}"), min(row["prefill"])
        token = [f"{1e3 * quantile(row, share):.1f}" for share in (0.25, 0.5)]
        faster = [times(ratio(row, by.get(other))) for other in (ORIGINAL, OWN)]
        whole = [f"{1e3 * prefill:.0f}", times(min(by[ORIGINAL]["prefill"]) / prefill)]
        body.append([what, f"{row['bytes'] / 1e6:.0f} MB", *token, *faster, *whole])
    after = f"ms a token after {result['prompt']} (25 %)"
    return table(["", "linear layers", after, "median", "vs bf16", "vs own", "ms of the prompt", "vs bf16"], body)


def _layout(result: dict[str, Any]) -> list[str]:
    words = f"{_shape(result)}, one thread: processor seconds for 10^9 bytes as stored, and for 10^9 weights."
    weights = result["shape"][0] * result["shape"][1]
    body = [
        [row["name"], f"{8 * row['stored'] / weights:.2f}", f"{8 * row['bytes'] / weights:.2f}",
         f"{1e9 * row['seconds'] / row['stored']:.1f}", f"{1e9 * row['seconds'] / weights:.1f}"]
        for row in result["rows"]
    ]  # fmt: skip
    return [words, table(["", "bits as stored", "bits in memory", "s by GB stored", "s by 10^9 weights"], body)]


def verdict(what: str, values: Sequence[float], goal: Goal, show: Any = times, lower: bool = False) -> str:
    """One line: every value, and whether the worst of them meets the target.

    Args:
        lower: whether less is better.
    """
    worst = max(values) if lower else min(values)
    floor, target, stretch = ((worst <= each if lower else worst >= each) for each in goal)
    said = "met" if target else "**not met**"
    more = " (stretch, too)" if stretch else "" if target else " (floor met)" if floor else " (**below the floor**)"
    shown = " / ".join(show(value) for value in values)
    return f"{what}: {shown} (target {show(goal[1])}): {said}{more}"


def goals(by: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A line for every target of which there are measurements."""
    lines: list[str] = []

    def add(what: str, values: Sequence[float | None], goal: Goal, **more: Any) -> None:
        found = [value for value in values if value is not None]
        if found:
            lines.append(verdict(what, found, goal, **more))

    one = by["gemv"]
    where = f" ({', '.join(_shape(result) for result in one)})"
    for level, goal in (("avx512", (0.65, 0.8, 0.9)), ("avx2", (0.55, 0.7, 0.8))):
        rows = [(result, pick(result, PLANES, level)) for result in one]
        shares = [share_of_read(result, row) for result, row in rows if row is not None]
        add(f"two trit planes, share of the plain read, {level}{where}", shares, goal, show=percent)
    against = {
        "torch bf16": (TORCH, (6, 9, 11)),
        "own bf16": (DENSE, (3, 3.7, 4.5)),
        "int4pack": (INT4PACK, (1.8, 2.4, 2.7)),
        "llama.cpp Q4_0": (Q4, (1.2, 1.5, 1.8)),
    }
    for name, (rival, goal) in against.items():
        values = [ratio(pick(result, PLANES, "best"), pick(result, rival, "best")) for result in one]
        add(f"two trit planes vs {name}{where}", values, goal)
    for name, goal in ((PARTIAL, (1.5, 1.5, 1.5)), (SPARSE, (1.5, 1.5, 1.5)), (LOW_RANK, (2, 3, 3.6))):
        values = [ratio(pick(result, name, "best"), pick(result, DENSE, "best")) for result in one]
        add(f"{name} vs own bf16{where}", values, goal)
    for result in by["tokens"]:
        count = result["tokens"]
        if count in TOKEN_GOALS:
            value = ratio(pick(result, PLANES, "best"), pick(result, TORCH))
            add(f"{count} tokens vs torch bf16", [value], TOKEN_GOALS[count])
        if count == 512:
            value = ratio(pick(result, PLANES, "avx2"), pick(result, TORCH_FP32))
            add("512 tokens, avx2 vs torch fp32", [value], (1, 1.3, 1.5))
    for result in by["model"]:
        whole = {row["name"]: row for row in result["rows"]}
        best = next((name for name in ("avx512", "avx2") if name in whole), None)
        if best:
            where = f"after {result['prompt']} tokens"
            add(f"whole model {where}, {best} vs bf16", [ratio(whole[best], whole[ORIGINAL])], (5, 7, 8.5))
        if "torch" in whole:
            add("no compiler, PyTorch's int8 product vs bf16", [ratio(whole["torch"], whole[ORIGINAL])], (1, 2, 2.6))
    for result in by["load"]:
        if result["load"]:
            one_thread, two_threads = two_by_one(result, PLANES)
            what = f"two threads by one, {result['load']} busy process{'es' if result['load'] > 1 else ''}"
            add(what, [two_threads / one_thread], (2, 1.3, 1.1), lower=True)
    return lines
