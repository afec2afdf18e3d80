"""The drawings of a linearized model: training, perplexity by position, recall, decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from markupsafe import Markup

from compressor.report.numbers import bytes_text, percent, significant, tick_bytes
from compressor.report.plot_lines import Series, decades_axis, even_axis, line_plot, steps_axis
from compressor.report.plots import Panel, bar, line, picture, round_ticks, text
from compressor.report.schema_linear import Decode, Distillation, Positions, Recall, Transfer, Who

WORDS: dict[Who, str] = {
    "teacher": "teacher",
    "student": "linearized",
    "window": "window and sinks alone",
    "memory": "memory alone",
}
CSS: dict[Who, str] = {"teacher": "dense", "student": "compressed", "window": "baseline", "memory": "odd"}
CAP = 2.5  # times the greatest perplexity of the teacher: what is beyond breaks


def training_panels(transfer: Sequence[Transfer], distillation: Distillation | None) -> list[Panel]:
    """Errors by layer, errors while training, and the losses of the training end to end."""
    panels = [Panel("Attention transfer, by layer", _by_layer(transfer))] if transfer else []
    curves = [entry for entry in transfer if entry.curve]
    if curves:
        panels.append(Panel("Attention transfer: a line is a layer", _transfer_curves(curves)))
    if distillation is not None and distillation.curve:
        points = distillation.curve
        kl = _by_stage("KL", [(point.tokens, point.kl, point.stage) for point in points])
        panels.append(Panel("End to end: KL to the teacher", _loss("KL", kl, "nats per token", "lin-kl")))
        ce = _by_stage("loss", [(point.tokens, point.ce, point.stage) for point in points if point.ce is not None])
        if ce:
            panels.append(Panel("End to end: cross-entropy of the text", _loss("loss", ce, "nats per token", "lin-ce")))
    return panels


def _by_layer(transfer: Sequence[Transfer]) -> Markup:
    """A line from the error before to that after; a diamond for the memory alone."""
    left, right, top, bottom = 46.0, 352.0, 24.0, 176.0
    values = [value for entry in transfer for value in (entry.before, entry.after, entry.memory_after or 0.0)]
    axis = decades_axis(values, _tick_percent)
    layers = [entry.layer for entry in transfer]
    low, pitch = min(layers), (right - left) / (max(layers) - min(layers) + 1)

    def height(value: float) -> float:
        return bottom - axis.place(value if math.isfinite(value) else 10**9) * (bottom - top)

    body = [text(2, 11, "relative error of the output, logarithmic", "label")]
    for tick, words in axis.ticks:
        body += [line(left, height(tick), right, height(tick), "grid")]
        body += [text(left - 5, height(tick) + 3.5, words, "tick", "end")]
    for entry in transfer:
        x = left + (entry.layer - low + 0.5) * pitch
        tip = f"layer {entry.layer}: {percent(entry.before, 2)} before, {percent(entry.after, 2)} after"
        before, after = height(entry.before), height(entry.after)
        body.append(line(x, before, x, after, "curve thin of-compressed"))
        body.append(f'<circle cx="{x:.2f}" cy="{before:.2f}" r="3.2" class="hollow"><title>{tip}</title></circle>')
        body.append(f'<circle cx="{x:.2f}" cy="{after:.2f}" r="3.6" class="compressed"><title>{tip}</title></circle>')
        if entry.memory_after is not None:
            y = height(entry.memory_after)
            tip = f"layer {entry.layer}: {percent(entry.memory_after, 2)}, memory alone"
            body.append(f'<path d="M{x:.2f} {y - 4:.2f}l4 4l-4 4l-4 -4z" class="odd"><title>{tip}</title></path>')
    body.append(line(left, bottom, right, bottom, "axis"))
    for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]}):
        body.append(text(left + (layer - low + 0.5) * pitch, bottom + 15, str(layer), "tick", "middle"))
    body.append(text(right, 210, "layer", "label", "end"))
    middle = [median(entry.before for entry in transfer), median(entry.after for entry in transfer)]
    told = f"{len(transfer)} layers; median {percent(middle[0], 2)} before, {percent(middle[1], 2)} after"
    return picture(360, 214, "Relative error of linearized layers before and after training", told, body, "lin-layers")


def _transfer_curves(transfer: Sequence[Transfer]) -> Markup:
    series = [
        Series(f"layer {entry.layer}", "faint", [(float(point.tokens), point.error, None) for point in entry.curve])
        for entry in transfer
    ]
    steps = min(len(entry.curve) for entry in transfer)
    middle = [
        (float(median(entry.curve[i].tokens for entry in transfer)), median(e.curve[i].error for e in transfer), None)
        for i in range(steps)
    ]
    series.append(Series("median of the layers", "compressed", middle))
    ys = [y for entry in series for _, y, _ in entry.points]
    xs = [x for entry in series for x, _, _ in entry.points]
    return line_plot(
        series,
        even_axis(xs, _tick_tokens),
        decades_axis(ys, _tick_percent),
        title="Relative error while a layer is trained",
        x_name="tokens",
        y_name="relative error, logarithmic",
        key="lin-curves",
        words=lambda value: percent(value, 2),
    )


def _by_stage(name: str, points: Sequence[tuple[int, float, int]]) -> list[Series]:
    """A line for each stage: losses of windows of different lengths do not continue each other."""
    words = {2: (name, "compressed"), 3: (f"{name}, longer windows", "odd")}
    stages = sorted({stage for _, _, stage in points})
    return [Series(*words[each], [(float(x), y, None) for x, y, stage in points if stage == each]) for each in stages]


def _loss(name: str, series: Sequence[Series], unit: str, key: str) -> Markup:
    points = [point for line in series for point in line.points]
    return line_plot(
        series,
        even_axis([x for x, _, _ in points], _tick_tokens),
        even_axis([y for _, y, _ in points], lambda tick: f"{tick:.4g}", zero=name == "KL"),
        title=f"{name} while training end to end",
        x_name="tokens",
        y_name=unit,
        key=key,
        words=lambda value: significant(value, 3),
    )


def bucket_words(positions: Positions) -> list[str]:
    """``1-64``, ``65-128``, ...: tokens before the predicted one."""
    return [f"{low + 1:,}\u2013{high:,}" for low, high in zip([0, *positions.edges], positions.edges, strict=False)]


def position_panels(positions: Positions, *, window: bool = True) -> list[Panel]:
    """Perplexity by bucket: a group of bars a bucket, from zero; bars that would flatten the others break."""
    left, right, top, bottom = 46.0, 352.0, 24.0, 176.0
    teacher = [value for row in positions.rows if row.who == "teacher" for value in row.perplexities]
    finite = [value for row in positions.rows for value in row.perplexities if math.isfinite(value)]
    cap = CAP * max((value for value in teacher if math.isfinite(value)), default=math.inf)
    largest = min(max(finite, default=1.0), cap)
    ticks = round_ticks(largest, 4)
    scale = (bottom - top) / largest
    group = (right - left) / len(positions.edges)
    thick = min(18.0, (group - 6) / len(positions.rows))
    body = [text(2, 11, "perplexity", "label")]
    for tick in ticks:
        y = bottom - tick * scale
        body += [line(left, y, right, y, "grid"), text(left - 5, y + 3.5, f"{tick:,.6g}", "tick", "end")]
    names = bucket_words(positions)
    for index, name in enumerate(names):
        start = left + (index + 0.5) * group - thick * len(positions.rows) / 2
        for place, row in enumerate(positions.rows):
            value = row.perplexities[index]
            broken = not value <= largest
            height = (bottom - top) if broken else value * scale
            tip = f"{WORDS[row.who]}, {name} tokens before: {significant(value)}"
            x = start + place * thick
            body.append(bar(x, bottom - height, thick - 1, height, CSS[row.who], tip))
            if broken:
                body += [line(x - 1, top + 12 + d, x + thick, top + 8 + d, "gap") for d in (0.0, 4.0)]
        edge = f"{positions.edges[index]:,}"
        body.append(text(left + (index + 0.5) * group, bottom + 15, f"\u2264 {edge}", "tick", "middle"))
    x, beyond = left + group, "beyond the window" if window else f"beyond {positions.window:,} tokens"
    if len(names) > 1:
        body += [line(x, top - 14, x, bottom, "edge"), text(x + 4, top - 7, beyond, "tick")]
    body += [
        line(left, bottom, right, bottom, "axis"),
        text(right, 210, "tokens before the predicted one", "label", "end"),
    ]
    told = "; ".join(
        f"{WORDS[row.who]}: {', '.join(significant(v, 3) for v in row.perplexities)}" for row in positions.rows
    )
    title = "Perplexity by the number of tokens before the predicted one"
    return [Panel("Perplexity by position", picture(360, 214, title, f"{', '.join(names)}. {told}", body, "lin-ppl"))]


def recall_panels(recall: Recall, *, window: bool = True) -> list[Panel]:
    """Gain against distance: in windows, or in as many tokens as stand for one where there is none."""
    if not recall.rows:
        return []
    series = [
        Series(
            WORDS[who],
            CSS[who],
            [(row.windows, row.gain, row.gain_stderr) for row in recall.rows if row.who == who],
        )
        for who in dict.fromkeys(row.who for row in recall.rows)
    ]
    far = [row.windows for row in recall.rows if row.beyond_context]
    ys = [row.gain + sign * (row.gain_stderr or 0.0) for row in recall.rows for sign in (-1, 1)]
    svg = line_plot(
        series,
        steps_axis([row.windows for row in recall.rows], lambda tick: f"{tick:g}"),
        even_axis(ys, lambda tick: f"{tick:.3g}".replace("-", "\u2212")),
        title="What a first occurrence gains, by distance",
        x_name="distance in windows" if window else f"distance, times {_unit(recall):,} tokens",
        y_name="gain, nats per token",
        key="lin-recall",
        words=lambda value: f"{significant(value, 3)} nats",
        shaded=(min(far), "beyond the teacher\u2019s context") if far else None,
    )
    return [Panel("Recall of a repeated passage", svg)]


def _unit(recall: Recall) -> int:
    """Tokens that count as a window."""
    return round(recall.rows[0].distance / recall.rows[0].windows)


def decode_panels(decode: Decode) -> list[Panel]:
    """Time and bytes against context."""
    if not decode.rows:
        return []
    x_axis = steps_axis([float(row.context) for row in decode.rows], lambda tick: f"{tick:,.0f}")
    times = [
        Series(WORDS["teacher"], CSS["teacher"], [(float(row.context), row.teacher_ms, None) for row in decode.rows]),
        Series(WORDS["student"], CSS["student"], [(float(row.context), row.student_ms, None) for row in decode.rows]),
    ]
    sizes = [
        Series(
            WORDS["teacher"], "dense", [(float(row.context), float(row.teacher_bytes), None) for row in decode.rows]
        ),
        Series(WORDS["student"], "compressed", [(float(r.context), float(r.student_bytes), None) for r in decode.rows]),
    ]
    spent = line_plot(
        times,
        x_axis,
        even_axis([y for entry in times for _, y, _ in entry.points], lambda tick: f"{tick:.4g}"),
        title="Time of the next token by context",
        x_name="tokens in the cache, logarithmic",
        y_name="milliseconds a token",
        key="lin-ms",
        words=lambda value: f"{significant(value, 3)} ms",
    )
    held = line_plot(
        sizes,
        x_axis,
        decades_axis([y for entry in sizes for _, y, _ in entry.points], tick_bytes),
        title="Bytes of the cache by context",
        x_name="tokens in the cache, logarithmic",
        y_name="bytes of the cache, logarithmic",
        key="lin-bytes",
        words=lambda value: bytes_text(round(value)),
    )
    return [Panel("Decoding: time", spent), Panel("Decoding: memory", held)]


def _tick_percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def _tick_tokens(count: float) -> str:
    return tick_bytes(count).removesuffix("B").rstrip()
