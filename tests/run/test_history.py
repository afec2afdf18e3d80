"""What a run knows of what came before it, of its own stages, and of what the two models say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from compressor.engine.checkpoint import open_checkpoint
from compressor.report.chain import chain_of
from compressor.report.comparison import read_entries
from compressor.report.files import REPORT, read_report
from compressor.run import samples
from compressor.run.export_dense import export_dense
from compressor.run.history import history_of
from compressor.run.measure import load_texts
from compressor.run.recipe import make_recipe

PRUNE = {"method": "magnitude", "sparsity": 0.7}
QUANTIZE = {"quantize": {"method": "rtn", "bits": 4, "group": 16}}


@pytest.fixture(scope="module")
def pruned(llama: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("history") / "pruned"
    tiny_models.run_recipe(tiny_models.recipe_for(calibration, {"method": "wanda", "sparsity": 0.5}), llama, output)
    return output


def test_a_chain_by_hand_remembers_every_run(llama: Path, pruned: Path, tmp_path: Path) -> None:
    assert history_of(open_checkpoint(llama)) == ([], [])
    second = tiny_models.run_recipe(tiny_models.recipe_for(None, QUANTIZE), pruned, tmp_path / "second")
    first = read_report(pruned)
    (earlier,) = second.history
    assert (earlier.source, earlier.label) == (first.model.source, first.stages[0].label)
    assert (earlier.source_bytes, earlier.output_bytes) == (first.size.source_bytes, first.size.output_bytes)
    assert earlier.sparsity == pytest.approx(0.5, abs=0.01)
    assert second.size.source_bytes == first.size.output_bytes
    runs, unknown = history_of(open_checkpoint(tmp_path / "second"))
    assert [run.label for run in runs] == [first.stages[0].label, second.stages[0].label]
    assert unknown == []


def test_an_export_in_between_counts_as_it_lies_there(pruned: Path, tmp_path: Path) -> None:
    """Pruned and packed, written dense, pruned again: compare and the chain tell the bytes of the dense folder."""
    export_dense(str(pruned), tmp_path / "plain", verify=False)
    size = (tmp_path / "plain" / "model.safetensors").stat().st_size
    packed, plain, told = read_entries([pruned, tmp_path / "plain", tmp_path / "plain" / "report.json"])
    assert packed.weight_bytes < 0.8 * size
    for entry in (plain, told):
        disk = sum(f.stat().st_size for f in (tmp_path / "plain").iterdir() if f.name not in ("README.md", REPORT))
        assert (entry.weight_bytes, entry.disk_bytes, entry.bits_linears, entry.bits_model) == (size, disk, 32.0, 32.0)
    report = tiny_models.run_recipe(tiny_models.recipe_for(None, QUANTIZE), tmp_path / "plain", tmp_path / "second")
    chain = chain_of(report)
    assert chain is not None and report.warnings == read_report(pruned).warnings
    assert [link.bytes for link in chain.links] == [report.history[0].source_bytes, size, report.size.output_bytes]
    assert chain.links[1].bits_linears == 32.0
    assert chain.links[1].run is not None and chain.links[1].run.label.endswith("; exported as dense")


def test_a_report_of_other_weights_is_not_believed(pruned: Path, tmp_path: Path) -> None:
    content = json.loads((pruned / "report.json").read_text())
    content["size"]["output_bytes"] *= 2
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in pruned.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "report.json").write_text(json.dumps(content))
    runs, (unknown,) = history_of(open_checkpoint(copy))
    assert runs == [] and "how the source was made is not shown" in unknown
    (copy / "report.json").write_text("{}")
    runs, (unknown,) = history_of(open_checkpoint(copy))
    assert runs == [] and "'report.json' is not a compressor report" in unknown
    report = tiny_models.run_recipe(tiny_models.recipe_for(None, PRUNE), copy, tmp_path / "out")
    assert report.history == [] and unknown in report.warnings[0]


def test_stages_of_a_recipe(llama: Path, calibration: Path, tmp_path: Path) -> None:
    wanda = {"method": "wanda", "sparsity": 0.5}
    report = tiny_models.run_recipe(tiny_models.recipe_for(calibration, wanda, QUANTIZE), llama, tmp_path / "out")
    first, last = report.stages
    assert first.matrices == last.matrices == len(report.layers)
    assert first.bytes > last.bytes == sum(layer.bytes for layer in report.layers)
    assert last.bits_per_weight == pytest.approx(report.size.bits_per_weight_linears)
    assert first.sparsity == pytest.approx(0.5, abs=0.01)
    assert first.relative_error is not None and 0 < first.relative_error < 1
    assert last.relative_error is None  # rounding looks at no data
    single = tiny_models.run_recipe(tiny_models.recipe_for(calibration, wanda), llama, tmp_path / "single")
    assert single.stages == [first]


def test_samples_are_what_the_two_models_say(llama: Path, calibration: Path, heldout: Path, tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "stages": [{"prune": {"method": "magnitude", "sparsity": 0.6}}],
        "evaluation": {"texts": [str(heldout)], "windows": 4, "seqlen": tiny_models.LENGTH, "samples": 3},
    }
    report = tiny_models.run_recipe(make_recipe(content), llama, tmp_path / "out")
    assert report.samples_skipped is None and len(report.samples) == 3
    tokenizer = tiny_models.tokenizer()
    texts = load_texts((str(heldout),), tokenizer, seqlen=tiny_models.LENGTH, windows=4)
    for sample, window in zip(report.samples, texts.ids, strict=False):
        ids = window[None, : samples.PROMPT]
        assert sample.prompt == tokenizer.decode(ids[0], skip_special_tokens=True)
        for folder, said in ((llama, sample.dense), (tmp_path / "out", sample.compressed)):
            assert said == tokenizer.decode(longhand(folder, ids), skip_special_tokens=True)
    assert any(sample.dense != sample.compressed for sample in report.samples)
    content["evaluation"]["samples"] = 0
    silent = tiny_models.run_recipe(make_recipe({**content, "verify": False}), llama, tmp_path / "silent")
    assert (silent.samples, silent.samples_skipped) == ([], None)
    content["evaluation"]["samples"] = 2
    untold = tiny_models.run_recipe(make_recipe({**content, "verify": False}), llama, tmp_path / "untold")
    assert untold.samples == [] and "verification was switched off" in str(untold.samples_skipped)


def longhand(folder: Path, ids: torch.Tensor) -> list[int]:
    """The most probable token, again and again, without a cache."""
    out: list[int] = []
    while len(out) < samples.TOKENS:
        logits = tiny_models.streamed_logits(folder, torch.cat([ids, torch.tensor([out], dtype=torch.long)], dim=1))
        if (best := int(logits[0, -1].argmax())) == 1:  # the end of the text
            break
        out.append(best)
    return out
