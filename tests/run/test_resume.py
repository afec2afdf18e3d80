"""Killed at any moment and run again: the same bytes, finished blocks not redone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from killing import Killed, killer

from compressor.errors import UserError
from compressor.run import stream

WEIGHTS = "model.safetensors"
BLOCKS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.random_model("llama", num_hidden_layers=BLOCKS)
    return tiny_models.save(model, tmp_path_factory.mktemp("models") / "deep")


@pytest.fixture(scope="module")
def recipe(calibration: Path, heldout: Path) -> Any:
    evaluation = {"texts": [str(heldout)], "windows": 2}
    stage = {"method": "sparsegpt", "sparsity": 0.5, "allocation": "owl"}
    return tiny_models.recipe_for(calibration, stage, evaluation=evaluation)


@pytest.fixture(scope="module")
def uninterrupted(source: Path, recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, tiny_models.run_recipe(recipe, source, output)


def same_result(output: Path, report: Any, uninterrupted: Any) -> None:
    expected, whole = uninterrupted
    assert (output / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    assert (output / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in expected.iterdir())
    assert report.evaluation == whole.evaluation
    assert [layer.model_copy(update={"seconds": 0.0}) for layer in report.layers] == [
        layer.model_copy(update={"seconds": 0.0}) for layer in whole.layers
    ]


@pytest.mark.slow
def test_killed_before_any_file_operation(
    source: Path, recipe: Any, uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        operations = killer(patch, -1)
        tiny_models.run_recipe(recipe, source, tmp_path / "counted")
    assert len(operations) > 3 * BLOCKS
    for fatal in range(len(operations)):
        output = tmp_path / f"killed-{fatal}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killer(patch, fatal)
            tiny_models.run_recipe(recipe, source, output)
        if output.exists():  # killed after it was published: complete, and the same command says so
            with pytest.raises(UserError, match="exists already"):
                tiny_models.run_recipe(recipe, source, output)
        report = tiny_models.run_recipe(recipe, source, output, overwrite=output.exists())
        same_result(output, report, uninterrupted)
        assert not output.with_name(output.name + ".partial").exists(), operations[fatal]
        shutil.rmtree(output)


def test_killed_while_writing_many_shards(
    source: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.engine.output.ONE_FILE", 1000)
    recipe = tiny_models.recipe_for(calibration, {"method": "wanda"}, save="dense")
    with monkeypatch.context() as patch:
        operations = killer(patch, -1)
        tiny_models.run_recipe(recipe, source, tmp_path / "whole")
    expected = tiny_models.digest(tmp_path / "whole", "*.safetensors*")
    assert len(expected) == BLOCKS + 2
    for fatal in range(1, len(operations) - 1, 3):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killer(patch, fatal)
            tiny_models.run_recipe(recipe, source, tmp_path / "out")
        tiny_models.run_recipe(recipe, source, tmp_path / "out", overwrite=True)
        assert tiny_models.digest(tmp_path / "out", "*.safetensors*") == expected
        shutil.rmtree(tmp_path / "out")


def test_finished_blocks_are_not_redone(
    source: Path, recipe: Any, uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited: list[int] = []
    plain = stream._visit_block

    def visit(run: Any, block: int) -> Any:
        if len(visited) in (2, 3):
            visited.append(-1)
            raise Killed
        visited.append(block)
        return plain(run, block)

    monkeypatch.setattr(stream, "_visit_block", visit)
    for _ in range(2):
        with pytest.raises(Killed):
            tiny_models.run_recipe(recipe, source, tmp_path / "out")
    report = tiny_models.run_recipe(recipe, source, tmp_path / "out")
    assert visited == [0, 1, -1, -1, 2, 3]
    assert (report.resumed.blocks, report.resumed.times) == (2, 2)
    same_result(tmp_path / "out", report, uninterrupted)
    assert uninterrupted[1].resumed is None


@pytest.fixture
def half_done(source: Path, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a run that was killed after two blocks."""
    plain = stream._visit_block

    def visit(run: Any, block: int) -> Any:
        if block == 2:
            raise Killed
        return plain(run, block)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stream, "_visit_block", visit)
        tiny_models.run_recipe(recipe, source, tmp_path / "out")
    return tmp_path / "out"


def test_another_recipe_does_not_resume(
    source: Path, recipe: Any, half_done: Path, uninterrupted: Any, calibration: Path, heldout: Path
) -> None:
    def varied(*more: dict[str, Any], text: Path = calibration, windows: int = 2, **stage: Any) -> Any:
        first = {"method": "sparsegpt", "sparsity": 0.5, "allocation": "owl", **stage}
        return tiny_models.recipe_for(text, first, *more, evaluation={"texts": [str(heldout)], "windows": windows})

    changes: list[tuple[list[str], Any]] = [
        (["sparsity", "0.5", "0.6"], varied(sparsity=0.6)),
        (["damp", "0.01", "0.02"], varied(damp=0.02)),
        (["stages"], varied({"method": "wanda", "sparsity": 0.7})),
        (["save"], recipe.model_copy(update={"save": "dense"})),
        (["calibration"], varied(text=heldout)),
        (["evaluation"], varied(windows=3)),
    ]
    before = tiny_models.digest(half_done.with_name("out.partial"), "*.safetensors")
    for words, other in changes:
        with pytest.raises(UserError) as caught:
            tiny_models.run_recipe(other, source, half_done)
        assert "\n" not in str(caught.value)
        for word in [*words, "--fresh"]:
            assert word in str(caught.value)
    assert tiny_models.digest(half_done.with_name("out.partial"), "*.safetensors") == before
    report = tiny_models.run_recipe(recipe, source, half_done)
    assert report.resumed is not None and report.resumed.blocks == 2
    same_result(half_done, report, uninterrupted)


def test_another_input_does_not_resume(half_done: Path, recipe: Any, source: Path, tmp_path: Path) -> None:
    other = tiny_models.save(tiny_models.random_model("llama", num_hidden_layers=BLOCKS, seed=5), tmp_path / "other")
    with pytest.raises(UserError, match=r"input was .*--fresh"):
        tiny_models.run_recipe(recipe, other, half_done)


def test_fresh_starts_over(
    half_done: Path, source: Path, recipe: Any, uninterrupted: Any, calibration: Path, tmp_path: Path
) -> None:
    report = tiny_models.run_recipe(recipe, source, half_done, fresh=True)
    assert report.resumed is None
    same_result(half_done, report, uninterrupted)


def test_damaged_working_folders(half_done: Path, source: Path, recipe: Any, uninterrupted: Any) -> None:
    journal = half_done.with_name("out.partial") / "journal.json"
    journal.write_text(journal.read_text()[:-5])
    with pytest.raises(UserError, match="--fresh"):
        tiny_models.run_recipe(recipe, source, half_done)
    journal.write_text("[]")
    with pytest.raises(UserError, match="--fresh"):
        tiny_models.run_recipe(recipe, source, half_done)
    report = tiny_models.run_recipe(recipe, source, half_done, fresh=True)
    same_result(half_done, report, uninterrupted)


def test_a_strangers_folder_of_that_name_is_left_alone(source: Path, recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(UserError, match=r"thesis\.txt"):
            tiny_models.run_recipe(recipe, source, tmp_path / "out", fresh=fresh)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years of work"


def test_two_runs_into_one_output(source: Path, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = stream._visit_block

    def visit(run: Any, block: int) -> Any:
        for fresh in (False, True):
            with pytest.raises(UserError, match="in use"):
                tiny_models.run_recipe(recipe, source, tmp_path / "out", fresh=fresh)
        return plain(run, block)

    monkeypatch.setattr(stream, "_visit_block", visit)
    tiny_models.run_recipe(recipe, source, tmp_path / "out")


@pytest.mark.slow
def test_kill_minus_nine(calibration: Path, tmp_path: Path) -> None:
    model = tiny_models.random_model("llama", num_hidden_layers=10, hidden_size=64, intermediate_size=128)
    source = tiny_models.save(model, tmp_path / "model")
    options = ["--method", "admm", "--nsamples", "24", "--seqlen", "32", "--calibration", str(calibration)]
    options += ["--eval", "none", "--no-verify", "--quiet"]

    def begin(output: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "compressor.cli.app", "prune", str(source), "-o", str(output), *options]
        root = Path(__file__).parent.parent.parent
        return subprocess.Popen(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def finished(output: Path) -> int:
        try:
            journal = output.with_name(output.name + ".partial") / "journal.json"
            return len(json.loads(journal.read_text())["blocks"])
        except (OSError, ValueError):
            return -1

    output, reached = tmp_path / "out", []
    for until in (1, 5):
        process = begin(output)
        while finished(output) < until and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.013 * until)  # somewhere inside a block
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was faster than this test"
        reached.append(finished(output))
        assert not output.exists()
    assert 1 <= reached[0] <= reached[1] and reached[1] >= 5
    assert begin(output).wait() == 0
    resumed = json.loads((output / "report.json").read_text())["resumed"]
    assert resumed == {"blocks": reached[1], "times": 2}
    assert begin(tmp_path / "whole").wait() == 0
    assert (output / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
