"""What ``compressor bench`` has measured, as a person reads it in a terminal of 80 columns."""

from __future__ import annotations

from compressor.cli.tables import Sheet, add_row, new_table, say, wide_console
from compressor.report.numbers import ABSENT, bytes_text, duration, percent, significant
from compressor.report.schema_bench import Bench, BenchWay


def print_bench(result: Bench) -> None:
    """Print all tables."""
    console = wide_console()
    told = f"{result.model}: {result.architecture}, {result.parameters:,} parameters"
    say(console, told, "bold")
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    activations = "8-bit" if result.activations == "int8" else "exact"
    width = result.bandwidth
    if any(way.layout_bytes for way in result.ways):
        say(console, f"packed layers by {result.rung}, {activations} activations ({result.rung_reason})")
    else:
        say(console, f"no layers that the kernels ({result.rung}) multiply packed")
    say(console, f"{result.device}, {threads}; memory {significant(width.bytes_per_second / 1e9, 3)} GB/s, {width.how}")
    peak = f"peak memory {bytes_text(result.peak_rss_bytes)} with the model alone"
    if result.peak_device_bytes is not None:
        peak += f", {bytes_text(result.peak_device_bytes)} on {result.device}"
    say(console, peak)
    console.print()
    console.print(weights_table(result))
    if any(way.prefill for way in result.ways):
        console.print(prefill_table(result))
    console.print(decode_table(result))
    if len(result.ways) > 1:
        say(console, f"x: {result.model} is so many times as fast. Models took turns, token by token.")
    for way in result.ways:
        for reason, count in way.reasons.items():
            say(console, f"  ! {count} packed layers another way than asked for: {reason}")
    for note in result.notes:
        say(console, f"  ! {note}")


def _multiplied(way: BenchWay) -> str:
    return ", ".join(f"{count} {name}" for name, count in way.products.items())


def _times(tokens: int, batch: int) -> str:
    return f"{tokens:,}" if batch == 1 else f"{tokens:,} x{batch}"


def weights_table(result: Bench) -> Sheet:
    """Who was measured, and what they hold."""
    table = new_table("Weights in memory", ("", "dtype", "linears by"), ("load", "bytes", "laid out"))
    for way in result.ways:
        laid_out = bytes_text(way.layout_bytes) if way.layout_bytes else ABSENT
        load = duration(way.load_seconds) if way.load_seconds is not None else ABSENT
        add_row(table, way.name, way.dtype, _multiplied(way), load, bytes_text(way.held_bytes), laid_out)
    return table


def prefill_table(result: Bench) -> Sheet:
    """Prompts read at once."""
    table = new_table("Prompts", ("",), ("tokens", "ms", "tokens/s", "x"))
    for index in range(len(result.ways[0].prefill)):
        for way in result.ways:
            row = way.prefill[index]
            faster = significant(row.speedup, 3) if row.speedup is not None else ""
            numbers = (significant(1000 * row.seconds, 3), significant(row.tokens_per_second, 3))
            add_row(table, way.name, _times(row.prompt, row.batch), *numbers, faster)
    return table


def decode_table(result: Bench) -> Sheet:
    """Token after token."""
    table = new_table("Tokens one by one", ("",), ("after", "ms", "tokens/s", "read", "GB/s", "of memory", "x"))
    for index in range(len(result.ways[0].decode)):
        for way in result.ways:
            row = way.decode[index]
            add_row(
                table,
                way.name,
                _times(row.context, row.batch),
                significant(1000 * row.seconds, 3),
                significant(row.tokens_per_second, 3),
                bytes_text(row.weight_bytes + row.cache_bytes),
                significant(row.bytes_per_second / 1e9, 3),
                percent(row.bandwidth_fraction),
                significant(row.speedup, 3) if row.speedup is not None else "",
            )
    return table
