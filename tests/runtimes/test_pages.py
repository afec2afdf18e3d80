"""The pages in a browser: nothing loaded, too wide or over each other, all of it legible, in every theme."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browsing, chromium
from large_reports import large
from promised import absent
from report_sample import full_report
from tiny_models import run_recipe

from compressor.report.bench_page import render_bench
from compressor.report.compare_page import render_page, render_side_by_side
from compressor.report.comparison import compare_texts, read_entries
from compressor.report.html import render_html
from compressor.report.schema_bench import Bandwidth, Bench, BenchDecode, BenchPrefill, BenchWay
from compressor.run.recipe import make_recipe

AUDIT = (Path(__file__).parent / "page_audit.js").read_text(encoding="utf-8")
VIEWS = ((1200, "light"), (1200, "dark"), (800, "dark"), (400, "light"))
PAPER = 718  # pixels between the margins of A4
PAGES = ("pruned", "chain", "linearized", "everything", "large", "experts", "side by side", "plots", "bench")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = chromium()
    if program is None:
        absent("Chromium")
    assert program is not None
    with browsing(program) as found:
        yield found


def bench() -> Bench:
    """Speeds of two models, as measured nowhere."""
    prefill = BenchPrefill(prompt=128, batch=1, seconds=0.2, tokens_per_second=640.0, speedup=None)
    decode = [
        BenchDecode(
            context=context,
            batch=1,
            seconds=0.01,
            tokens_per_second=100.0 - context / 100,
            weight_bytes=3_000_000,
            cache_bytes=40_000,
            bytes_per_second=3e8,
            bandwidth_fraction=0.1,
        )
        for context in (0, 256, 1024)
    ]
    ways = [
        BenchWay(
            name=name,
            dtype="float32",
            products={"avx512": 42},
            load_seconds=0.4,
            held_bytes=9_000_000,
            layout_bytes=4_000_000,
            prefill=[prefill],
            decode=decode,
        )
        for name in ("model", "base")
    ]
    return Bench(
        version="0.1.0",
        command="compressor bench toy",
        started="2026-01-02T03:04:05Z",
        model="toy",
        architecture="LlamaForCausalLM",
        parameters=900_000,
        disk_bytes=941_400,
        base="toy-original",
        notes=["base in bfloat16: its own dtype"],
        device="cpu",
        threads=2,
        rung="avx512",
        rung_reason="the best this processor has",
        activations="int8",
        steps=16,
        bandwidth=Bandwidth(bytes_per_second=1.2e10, how="reading by the kernels", bytes=512_000_000),
        peak_rss_bytes=500_000_000,
        ways=ways,
        seconds=12.0,
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file for each of ``PAGES``: of two runs, one on the other's output, and of samples that fill every field."""
    folder = tmp_path_factory.mktemp("pages")
    common: dict[str, Any] = {
        "calibration": {"sources": ["embedded"], "nsamples": 4, "seqlen": 64},
        "evaluation": {"windows": 2},
    }
    pruned = {"stages": [{"prune": {"method": "wanda", "sparsity": 0.3}}], **common}
    chained = {
        "stages": [{"prune": {"method": "magnitude", "sparsity": 0.5}}, {"quantize": {"method": "rtn", "bits": 4}}],
        **common,
    }
    run_recipe(make_recipe(pruned), Path("embedded"), folder / "pruned")
    run_recipe(make_recipe(chained), folder / "pruned", folder / "chained")
    sample = full_report(12)
    named = sample.model_copy(
        update={"model": sample.model.model_copy(update={"source": "organisation/" + "long" * 30})}
    )
    entries = read_entries([folder / "pruned", folder / "chained"])
    groups = compare_texts(entries)
    texts = {
        "pruned": (folder / "pruned" / "report.html").read_text(encoding="utf-8"),
        "chain": (folder / "chained" / "report.html").read_text(encoding="utf-8"),
        "linearized": render_html(full_report(linearized=True)),
        "everything": render_html(named),
        "large": render_html(large(sample)),
        "experts": render_html(large(sample, blocks=48, experts=16)),
        "side by side": render_side_by_side(entries, groups),
        "plots": render_page(entries, groups),
        "bench": render_bench(bench()),
    }
    files = {name: folder / f"{name}.html" for name in texts}
    for name, file in files.items():
        file.write_text(texts[name], encoding="utf-8")
    return files


def troubles(browser: Browser) -> list[str]:
    """Messages on the console, and everything that was asked for beside the page itself."""
    told = []
    for event in browser.events:
        method, what = event.get("method"), event.get("params", {})
        if method in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            told.append(str(what))
        if method == "Network.requestWillBeSent" and what["type"] != "Document":
            told.append(what["request"]["url"])
    return told


def colours(png: bytes) -> int:
    """How many different bytes the rows of a PNG have: one or two where it is blank."""
    data, at = b"", 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        data += png[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    return len(set(zlib.decompress(data)))


@pytest.mark.parametrize("name", PAGES)
def test_page(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.show(1200)
    browser.open(pages[name])
    browser.value("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    for width, scheme in VIEWS:
        browser.show(width, scheme)
        found = browser.value(AUDIT)
        for what in ("wide", "faint", "crossed", "outside"):
            assert found[what] == [], (what, width, scheme)
        assert colours(browser.picture(whole=False)) > 20
    assert troubles(browser) == []


@pytest.mark.parametrize("name", PAGES)
def test_printed(browser: Browser, pages: dict[str, Path], name: str) -> None:
    """On paper everything is dark on white whatever the screen, opened, and no table is cut at its right edge."""
    browser.show(1200, "dark")
    browser.open(pages[name])
    browser.show(PAPER, "dark", "print")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    found = browser.value(AUDIT)
    for what in ("wide", "faint", "crossed", "outside", "hidden"):
        assert found[what] == [], what
    closed = "[...document.querySelectorAll('details > :not(summary)')].filter((part) => !part.checkVisibility("
    assert browser.value(closed + "{contentVisibilityAuto: true})).length") == 0
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 1


def test_the_audit_finds_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    """A check that cannot fail checks nothing."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><title>bad</title><script>console.error('x')</script><img src='absent.png' alt=''>"
        "<p style='color:#999;background:#fff'>pale</p><div style='width:3000px'>wide</div>"
        "<svg role='img' viewBox='0 0 100 50' width='100' height='50'><rect width='20' height='20' fill='#000'/>"
        "<text x='0' y='15' class='on-h0' fill='#fff'>too long a text</text>"
        "<text x='5' y='15' fill='#222'>another</text></svg>",
        encoding="utf-8",
    )
    browser.show(400)
    browser.open(page)
    found = browser.value(AUDIT)
    assert all(found[what] for what in ("wide", "faint", "crossed", "outside")), found
    assert len(troubles(browser)) >= 2
