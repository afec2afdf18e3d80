"""The page of ``compressor bench --plot``: tokens per second by context, and the tables. No scripts, one file."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from compressor.report.environment import environment
from compressor.report.numbers import significant
from compressor.report.plot_lines import Series, even_axis, line_plot, steps_axis
from compressor.report.plots import Panel
from compressor.report.schema_bench import Bench

CSS = {"model": "compressed", "base": "dense", "base in bfloat16": "baseline", "base, our product": "odd"}
"""Way -> its colour."""


def render_bench(result: Bench) -> str:
    """The whole page as text."""
    batches = list(dict.fromkeys(row.batch for row in result.ways[0].decode))
    panels = [panel for batch in batches for panel in _panels(result, batch)]
    page: str = environment().get_template("bench.html.j2").render(bench=result, panels=panels, css=CSS)
    return page


def _panels(result: Bench, batch: int) -> list[Panel]:
    """Plots for one batch: single tokens, and prompts where more than one was read."""
    rows = "" if batch == 1 else f", batch {batch}"
    out = []
    tokens = [[(r.context, r.tokens_per_second) for r in way.decode if r.batch == batch] for way in result.ways]
    out.append(Panel(f"Tokens one by one{rows}", _plot(result, tokens, f"decode{batch}", "tokens before")))
    prompts = [[(r.prompt, r.tokens_per_second) for r in way.prefill if r.batch == batch] for way in result.ways]
    if len(prompts[0]) > 1:
        out.append(Panel(f"Prompts{rows}", _plot(result, prompts, f"prefill{batch}", "tokens in the prompt")))
    return out


def _plot(result: Bench, points: Sequence[Sequence[tuple[int, float]]], key: str, x_name: str) -> Markup:
    def words(value: float) -> str:
        return significant(value, 3)

    # half the shortest: the axis is logarithmic, and has no place for none at all
    none = min((x for line in points for x, _ in line if x), default=2) / 2
    series = [
        Series(way.name, CSS[way.name], [(x or none, y, None) for x, y in line])
        for way, line in reversed(list(zip(result.ways, points, strict=True)))
    ]
    xs = [float(x or none) for line in points for x, _ in line]
    x_axis = steps_axis(xs, lambda value: "0" if value == none else f"{value:,.0f}")
    y_axis = even_axis([y for line in points for _, y in line], words)
    name = "tokens per second"
    return line_plot(series, x_axis, y_axis, title=name, x_name=x_name, y_name=name, key=key, words=words)
