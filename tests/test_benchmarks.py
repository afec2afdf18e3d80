"""The pure parts of the benchmark scripts: tables, sentences, sections. Nothing is timed."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    against_tables,
    decomposition,
    decomposition_tables,
    measuring,
    memory,
    quality,
    quality_tables,
    run_all,
    sections,
    synthetic,
    whitening,
)
from benchmarks.child import run_child
from compressor.run.recipe import make_recipe


def result(method: str, target: str, values: dict[str, float], nsamples: int = 64) -> dict[str, Any]:
    job = {"model": "m", "method": method, "target": target, "nsamples": nsamples, "seqlen": 256, "windows": 2}
    return {"job": job, "perplexity": values, "windows_of": dict.fromkeys(values, 2), "excluded": [], "seconds": 1.0}


def results(admm: float = 10.0) -> list[dict[str, Any]]:
    return [
        result("dense", "", {"a.jsonl": 4.0, "b.jsonl": 9.0}),
        result("magnitude", "70%", {"a.jsonl": 40.0, "b.jsonl": 90.0}),
        result("sparsegpt", "70%", {"a.jsonl": 20.0, "b.jsonl": 45.0}),
        result("sparsegpt+refit", "70%", {"a.jsonl": 19.0, "b.jsonl": 46.0}),
        result("admm", "70%", {"a.jsonl": admm, "b.jsonl": 40.0}),
    ]


def test_table_is_markdown() -> None:
    assert sections.table(["x", "y"], [["1", "2"]]) == "| x | y |\n| --- | ---: |\n| 1 | 2 |"


@pytest.mark.parametrize(
    ("value", "text"), [(1.234, "1.23"), (123.456, "123.5"), (12345.6, "12346"), (2e7, "2.0e+07"), (None, "-")]
)
def test_numbers(value: float | None, text: str) -> None:
    assert sections.number(value) == text


def test_a_section_is_renewed_in_place_and_the_rest_stays() -> None:
    page = sections.replace_section(sections.replace_section("# Head\n", "one", "old"), "two", "other")
    again = sections.replace_section(page, "one", "new")
    assert again == page.replace("old", "new")
    assert again.count("<!-- begin one -->") == 1


def test_machine_line_names_processor_and_versions() -> None:
    line = sections.machine_line()
    assert sections.processor() in line
    assert "torch 2" in line and "GiB" in line


def test_mean_is_geometric() -> None:
    assert quality_tables.perplexity(results()[0], quality_tables.MEAN) == pytest.approx(6.0)


def test_quality_table_marks_the_best() -> None:
    found = quality_tables.lookup(results(), "m", 64)
    table = quality_tables.text_table(found, "a.jsonl")
    assert table.count("**") == 2
    assert "| admm | **10.00** |" in table
    assert "a (dense: 4.00)" in table


def test_quality_verdicts_follow_the_numbers() -> None:
    found = quality_tables.lookup(results(), "m", 64)
    sentences = quality_tables.verdicts(found)
    assert "magnitude is the worst everywhere: as expected." in sentences
    assert any("sparsegpt+refit is at or below sparsegpt in 1 of 2 cells" in s and "b (x1.022)" in s for s in sentences)
    assert any("admm is at or below sparsegpt everywhere (2 of 2 cells)" in s for s in sentences)
    assert any("admm is clearly below sparsegpt at 70%" in s and "on every text" in s for s in sentences)
    worse = quality_tables.verdicts(quality_tables.lookup(results(admm=50.0), "m", 64))
    assert any("**not always the worst**" in s and "admm" in s for s in worse)
    assert any("**not on all**" in s for s in worse)


def test_quality_section_of_two_sizes() -> None:
    more = [result("sparsegpt", "70%", {"a.jsonl": 10.0, "b.jsonl": 45.0}, nsamples=128)]
    section = quality_tables.quality_section([*results(), *more], "stories")
    assert "calibrated on 64 windows" in section and "calibrated on 128 windows" in section
    assert "128 instead of 64 windows change the perplexities on average by: sparsegpt x0.707." in section


def test_quality_jobs_and_stages() -> None:
    args = argparse.Namespace(
        brief=[], nsamples=[64, 128], targets=["50%", "4:8"], methods=["wanda", "admm"], seqlen=8, windows=2
    )
    jobs = quality.plan_jobs(["m"], args)
    assert [job.method for job in jobs if job.nsamples == 128] == ["admm", "admm"]
    assert len(jobs) == 1 + 4 + 2
    assert quality.prune_stage("wanda+refit", "50%")["prune"] == {
        "method": "wanda", "refit": True, "sparsity": 0.5, "exclude": []
    }  # fmt: skip
    assert quality.prune_stage("admm", "4:8", ["x"])["prune"]["pattern"] == "4:8"
    assert quality.indivisible({"intermediate_size": 172}, "4:8") == (r"\.down_proj$",)
    assert quality.indivisible({"intermediate_size": 172}, "2:4") == ()


def test_quality_cache_survives_a_cut_line(tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    cache.write_text('{"job": 1}\n{"job": ')
    assert measuring.read_cache(cache) == [{"job": 1}]


def against_rows(seconds: float, peak: int, perplexity: float) -> list[dict[str, Any]]:
    common = {"model": "m", "cpu_seconds": 1.0}
    rows = []
    for repetition in (0, 1):
        value = perplexity if repetition == 0 else None
        ours = {"seconds": seconds, "peak_bytes": peak, "tree_bytes": peak, "perplexity": value}
        theirs = {"seconds": 12.0, "peak_bytes": 100, "tree_bytes": 100, "perplexity": 20.0 if value else None}
        for tool, facts in ((against_tables.OURS[0], ours), (against_tables.THEIRS, theirs)):
            rows.append({**common, "tool": tool, "repetition": repetition, **facts})
    return rows


def test_against_verdicts_say_met_and_not_met() -> None:
    (good,) = against_tables.verdicts(against_rows(3.0, 40, 19.0), "m")
    assert good.count(": met") == 2 and "better" in good and "not met" not in good
    (bad,) = against_tables.verdicts(against_rows(6.0, 60, 21.0), "m")
    assert bad.count("**not met**") == 2 and "**worse**" in bad
    (same,) = against_tables.verdicts(against_rows(6.0, 60, 20.001), "m")
    assert "equal" in same


def test_against_table_has_pair_ratios() -> None:
    assert "0.25 (0.25-0.25)" in against_tables.model_table(against_rows(3.0, 40, 19.0), "m")


def outcome(blocks: int, peak: int, problem: str = "") -> memory.Outcome:
    return memory.Outcome("magnitude", blocks, 400, 300, peak, 1.0, "" if problem else "block by block", problem)


def test_memory_verdicts() -> None:
    flat = memory.verdicts([outcome(20, 101), outcome(10, 100)])
    assert flat[0].startswith("Every run finished") and "does not grow" in flat[1]
    assert "**grows" in memory.verdicts([outcome(20, 180), outcome(10, 100)])[1]
    failed = [outcome(20, 100, "exit code 1: x"), outcome(10, 100)]
    assert memory.verdicts(failed)[0] == "**Not every run finished verified**: magnitude with 20 blocks."
    assert "**failed**: exit code 1: x" in memory.outcome_table(failed)


def test_synthetic_sizes_and_shards() -> None:
    blocks = synthetic.blocks_for(1e9, 256, 512, 100, "float32")
    sizes = synthetic.block_shapes(0, 256, 512)
    one = 4 * sum(a * (b[0] if b else 1) for a, *b in sizes.values())
    assert (blocks - 1) * one < 1e9 <= (blocks + 1) * one
    shards = synthetic.shards_of(sizes, 4, 256 * 256 * 4 * 2)
    assert [name for shard in shards for name in shard] == list(sizes)
    assert len(shards) > 2


def test_synthetic_checkpoint_is_pruned(tmp_path: Path) -> None:
    """The made-up model and its tokenizer are whole: the engine opens and prunes it."""
    from compressor.run.stream import Options, compress

    folder, ids = tmp_path / "model", tmp_path / "ids.npy"
    synthetic.make(folder, blocks=2, hidden=64, ffn=96, vocabulary=64, dtype="bfloat16", shard_bytes=50_000)
    synthetic.make_ids(ids, windows=4, length=32, vocabulary=64)
    content = {
        "stages": [{"prune": {"method": "wanda", "sparsity": 0.5}}],
        "calibration": {"sources": [str(ids)], "nsamples": 4, "seqlen": 32},
        "evaluation": {"texts": ["none"], "baseline": False},
        "verify": False,
    }
    report = compress(make_recipe(content), str(folder), Options(output=tmp_path / "out"))
    assert report.model.blocks == 2
    assert all(layer.sparsity == 0.5 for layer in report.layers)


def test_run_child_measures_and_limits() -> None:
    done = run_child([sys.executable, "-c", "print('x'); raise SystemExit(3)"])
    assert (done.code, done.output.strip()) == (3, "x")
    assert done.peak_bytes > 1_000_000 and done.tree_bytes >= done.peak_bytes
    limited = run_child([sys.executable, "-c", "bytearray(10**9)"], address_space=500_000_000)
    assert limited.code == 1 and "MemoryError" in limited.errors


def test_run_all_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all.main(["qualty"]) == 2
    assert "qualty" in capsys.readouterr().err


def low_rank_result(row: str, bits: float, loss: float) -> dict[str, Any]:
    """A result whose loss is the same on both texts; the dense model's perplexities are 10 and 100."""
    perplexity = {"stories.jsonl": 10 * math.exp(loss), "wiki.jsonl": 100 * math.exp(loss)}
    sizes = {"nsamples": 64, "seqlen": 256, "windows": 120}
    return {"model": "m", "row": row, "bits": bits, "bits_half": bits, "perplexity": perplexity, **sizes}


def low_rank_results(energy: float = 0.3, dobi: float = 0.2, integers: float = 0.1) -> list[dict[str, Any]]:
    return [
        low_rank_result("dense", 16, 0.0),
        low_rank_result("gptq 3-bit", 3.2, 2 * integers),
        low_rank_result("gptq 4-bit", 4.2, integers),
        low_rank_result("svd-llm paper 80 %", 12.7, 1.0),
        low_rank_result("svd-llm energy 80 %", 12.8, energy),
        low_rank_result("dobi 80 %", 12.8, dobi),
        low_rank_result("svd-llm energy, 8-bit factors 80 %", 12.3, 0.05),
    ]


def test_decomposition_verdicts_follow_the_numbers() -> None:
    said = decomposition_tables.verdicts({r["row"]: r for r in low_rank_results()}, "stories")
    assert "mean 0.3000 against 1.0000 (x0.30, met); stories 0.3000 against 1.0000 (x0.30, met)" in said[0]
    assert said[1].startswith("dobi 80 % (12.80 bits)") and "better by 0.1000" in said[1] and "not" not in said[1]
    assert "gptq 3-bit (3.20 bits; mean 0.2000, stories 0.2000) loses no more: quantization" in said[-2]
    assert said[-1].endswith("low rank is the better buy.")
    worse = low_rank_results(energy=0.71, dobi=0.8, integers=5.0)
    said = decomposition_tables.verdicts({r["row"]: r for r in worse}, "stories")
    assert said[0].count("**not met**") == 2
    assert "**does not beat it**, by 0.0900" in said[1]
    assert said[-2].endswith("low rank is the better buy.")


def test_a_difference_by_chance_is_neither_better_nor_worse() -> None:
    said = decomposition_tables.verdicts({r["row"]: r for r in low_rank_results(dobi=0.296)}, "stories")
    assert said[1].count("does not beat it, the same but for chance") == 2 and "better by" not in said[1]


def test_quantization_is_no_better_buy_in_more_bytes() -> None:
    rows = [*low_rank_results(integers=5.0), low_rank_result("gptq 8-bit", 12.81, 0.0)]
    said = decomposition_tables.verdicts({r["row"]: r for r in rows}, "stories")
    assert said[-2].endswith("low rank is the better buy.")


def test_decomposition_section_has_a_table_for_every_share_there_is() -> None:
    section = decomposition_tables.decomposition_section(low_rank_results(), "stories")
    assert section.count("| method |") == 2  # of 80 %, and of integers alone
    own = section.split("80 % kept, and")[1].split("Integers alone")[0]
    assert "| gptq 4-bit | 4.200 | 4.200 | +0.1000 | +0.1000 | +0.1000 |" in own and "| gptq 3-bit |" not in own


def test_decomposition_rows() -> None:
    assert set(decomposition.BRIEF) <= set(decomposition.ROWS)
    assert decomposition.rows_of("mix14m", list(decomposition.ROWS), ["mix14m"])[1:] == [
        row for row in decomposition.ROWS if row in decomposition.BRIEF
    ]
    assert decomposition.ROWS["svd-llm paper 60 %"] == [
        {"decompose": {"method": "svd-llm", "fit": "paper", "keep_params": 0.6}}
    ]
    for stages in decomposition.ROWS.values():
        make_recipe({"stages": stages})


def test_bits_in_halves_count_whole_matrices_as_16_bits() -> None:
    def item(group: str, parameters: int, size: int) -> SimpleNamespace:
        return SimpleNamespace(group=group, parameters=parameters, bytes=size)

    items = [item("compressed linears", 100, 100), item("kept linears", 100, 400), item("embeddings", 1, 4)]
    assert measuring.bits_in_halves(items) == 12.0
    assert measuring.bits_in_halves([item("kept linears", 10, 20)]) == 16.0


def test_whitening_ways_agree_and_verdicts_say_which_was_faster() -> None:
    W, H = whitening.problem(24, 16, 64)
    rank = whitening.kept_rank(24, 16)
    theirs, mine = (left @ right for left, right in (whitening.published(W, H, rank), whitening.ours(W, H, rank)))
    assert rank == 5 and float((theirs - mine).norm() / W.norm()) < 1e-4
    found = {way: {"seconds": 1.0, "peak": 2e6, "error": 0.5} for way in whitening.WAYS} | {
        "nothing": {"seconds": 0.0, "peak": 1e6, "error": 1.0},
        "published": {"seconds": 2.0, "peak": 3e6, "error": 0.5},
    }
    assert whitening.verdicts({"a": found}) == [
        "a: faster by x2.00, less memory (1 against 2 MB); lost 0.500000 against 0.500000."
    ]
    slow = found | {"ours": {"seconds": 4.0, "peak": 5e6, "error": 0.5}}
    assert "**slower** by x2.00, **more** memory (4 against 2 MB)" in whitening.verdicts({"a": slow})[0]
    assert whitening.row("a", found)[1:6] == ["2.00 s", "1.00 s", "1.00 s", "2.00 x", "2.00 x"]
