"""Learning the codes of all blocks together: what is written, what is refused, and the same bytes after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from killing import Killed, killer

from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.skeleton import build_skeleton
from compressor.errors import UserError
from compressor.run import distill_codes, stream

SIGNS: dict[str, Any] = {"method": "pb-llm", "group": 16}
LEARNING: dict[str, Any] = {"tune_mode": "end-to-end", "tune_steps": 12, "tune_rate": 0.03}
OTHERS: list[dict[str, Any]] = [
    {"method": "rtn", "bits": 3, "group": 16},
    {"method": "trit-planes", "planes": 1, "group": 16},
    {"method": "ptq161"},
    {"method": "gptq", "bits": 2, "group": 16, "correct": 4},
    {"method": "flexround", "bits": 3, "group": 16},
]


def recipe(calibration: Path, stage: dict[str, Any], **content: Any) -> Any:
    return tiny_models.recipe_for(calibration, {"quantize": {**stage, **LEARNING}}, **content)


def divergences(report: Any) -> tuple[float, float]:
    """What every matrix that learned is told of: the same of all."""
    notes = {note for layer in report.layers for note in layer.notes if note.startswith("learned end to end")}
    assert len(notes) == 1
    before, after = notes.pop().split("windows ")[1].split(" nats")[0].split(" -> ")
    return float(before), float(after)


@pytest.mark.parametrize("stage", [SIGNS, *OTHERS], ids=lambda stage: stage["method"])
def test_comes_nearer_to_the_dense_model_and_takes_no_byte(
    stage: dict[str, Any], half: Path, calibration: Path, heldout: Path, tmp_path: Path
) -> None:
    settings = {"evaluation": {"texts": [str(heldout)], "windows": 4}}
    still = {**stage, "tune_steps": 1, "tune_rate": 1e-9} if stage["method"] == "flexround" else stage
    plain = tiny_models.run_recipe(
        tiny_models.recipe_for(calibration, {"quantize": still}, **settings), half, tmp_path / "plain"
    )
    report = tiny_models.run_recipe(recipe(calibration, stage, verify=True, **settings), half, tmp_path / "out")
    assert report.size.weights_bytes == plain.size.weights_bytes
    assert report.verification is not None and report.verification.passed
    before, after = divergences(report)
    assert after < before
    assert all(layer.relative_error is None for layer in report.layers)
    rows = [{row.label: row.perplexity for row in r.evaluation[0].rows} for r in (plain, report)]
    assert rows[0]["dense"] == rows[1]["dense"]  # and the baseline, which has as many bytes
    assert len(set(rows[0].values()) & set(rows[1].values())) == 2
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "plain").iterdir()}


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_moe"])
def test_other_architectures(family: str, calibration: Path, tmp_path: Path) -> None:
    """Transposed matrices, soft-capped logits, experts that not every batch reaches."""
    source = tiny_models.save(tiny_models.random_model(family), tmp_path / "model")
    report = tiny_models.run_recipe(recipe(calibration, SIGNS, verify=True), source, tmp_path / "out")
    before, after = divergences(report)
    assert after < before
    assert report.verification is not None and report.verification.passed


def test_coded_embeddings_belong_to_the_model_that_learns(half: Path, calibration: Path, tmp_path: Path) -> None:
    found = recipe(calibration, {**SIGNS, "embeddings": 4, "exclude": ["down_proj"]}, verify=True)
    report = tiny_models.run_recipe(found, half, tmp_path / "out")
    before, after = divergences(report)
    assert after < before
    assert report.verification is not None and report.verification.passed
    assert {layer.kind for layer in report.layers if not layer.notes} == {"mlp.down_proj"}


def test_where_nothing_is_gained_the_codes_stay(
    half: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_models.recipe_for(calibration, {"quantize": SIGNS})
    tiny_models.run_recipe(plain, half, tmp_path / "plain")
    wild = tiny_models.recipe_for(calibration, {"quantize": {**SIGNS, **LEARNING, "tune_rate": 0.99}})
    monkeypatch.setattr("compressor.engine.distill_codes._judge", lambda *_: 1.0)
    tiny_models.run_recipe(wild, half, tmp_path / "out")
    digests = [tiny_models.digest(tmp_path / name, "*.safetensors") for name in ("plain", "out")]
    assert digests[0] == digests[1]


def test_saved_dense_it_is_the_same_model(half: Path, calibration: Path, tmp_path: Path) -> None:
    for save in ("dense", "packed"):
        tiny_models.run_recipe(recipe(calibration, SIGNS, save=save), half, tmp_path / save)
    read = [build_skeleton(open_checkpoint(tmp_path / save)) for save in ("dense", "packed")]
    for linear in read[0].linears:
        first, second = (skeleton.read(f"{linear.name}.weight") for skeleton in read)
        assert torch.equal(first, second)


def test_zeros_of_a_pruned_source_stay(half: Path, calibration: Path, tmp_path: Path) -> None:
    prune = tiny_models.recipe_for(calibration, {"method": "wanda", "sparsity": 0.5})
    tiny_models.run_recipe(prune, half, tmp_path / "pruned")
    stage = {"method": "trit-planes", "planes": 1, "group": 16, "exclude": ["down_proj"]}
    tiny_models.run_recipe(recipe(calibration, stage), tmp_path / "pruned", tmp_path / "out")
    before, after = (build_skeleton(open_checkpoint(tmp_path / name)) for name in ("pruned", "out"))
    for linear in before.linears:
        name = f"{linear.name}.weight"
        if "down_proj" in name:
            assert torch.equal(before.read(name), after.read(name))
        else:
            assert bool((after.read(name)[before.read(name) == 0] == 0).all())


def test_threads_do_not_matter(calibration: Path, tmp_path: Path) -> None:
    model = tiny_models.random_model("llama", hidden_size=128, intermediate_size=192, dtype=torch.bfloat16)
    source = tiny_models.save(model, tmp_path / "model")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            tiny_models.run_recipe(recipe(calibration, SIGNS), source, tmp_path / str(threads))
    finally:
        torch.set_num_threads(before)
    assert tiny_models.digest(tmp_path / "1", "*.safetensors") == tiny_models.digest(tmp_path / "2", "*.safetensors")


@pytest.fixture(scope="module")
def whole(half: Path, calibration: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe, what it gives when nothing comes between, and the report."""
    asked = recipe(calibration, SIGNS, evaluation={"texts": [str(heldout)], "windows": 2})
    folder = tmp_path_factory.mktemp("whole") / "out"
    return asked, folder, tiny_models.run_recipe(asked, half, folder)


def same(output: Path, report: Any, whole: Any) -> None:
    _, expected, told = whole
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (output / name).read_bytes() == (expected / name).read_bytes()
    assert report.evaluation == told.evaluation
    timeless = [[layer.model_copy(update={"seconds": 0.0}) for layer in r.layers] for r in (report, told)]
    assert timeless[0] == timeless[1]
    assert not output.with_name(output.name + ".partial").exists()


def test_killed_while_learning_and_resumed(
    half: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits, steps = 0, 0
    visit, step = stream._visit_block, distill_codes.distill.__globals__["loss_backward"]

    def counted(*args: Any) -> Any:
        nonlocal visits
        visits += 1
        return visit(*args)

    def dies(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps in (6, 10):
            raise Killed
        return step(*args, **kwargs)

    monkeypatch.setattr(stream, "_visit_block", counted)
    monkeypatch.setattr("compressor.engine.distill_codes.loss_backward", dies)
    for _ in range(2):
        with pytest.raises(Killed):
            tiny_models.run_recipe(whole[0], half, tmp_path / "out")
    report = tiny_models.run_recipe(whole[0], half, tmp_path / "out")
    assert visits == 2 and steps == 12 + 2  # nothing was done twice but the steps in which it died
    same(tmp_path / "out", report, whole)


def test_killed_while_the_blocks_are_written_and_resumed(
    half: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every file operation from the last step of learning on."""
    with monkeypatch.context() as patch:
        operations = killer(patch, -1)
        tiny_models.run_recipe(whole[0], half, tmp_path / "counted")
    last = max(i for i, told in enumerate(operations) if "state.safetensors" in told)
    published = next(i for i, told in enumerate(operations) if told.startswith("rename"))
    assert published - last > 4  # shards, states, journal, what was kept for learning
    for fatal in range(last, published):
        output = tmp_path / f"killed-{fatal}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killer(patch, fatal)
            tiny_models.run_recipe(whole[0], half, output)
        same(output, tiny_models.run_recipe(whole[0], half, output), whole)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({**SIGNS, "tune_mode": "end-to-end"}, "needs tune_steps"),
        ({"method": "awq", "bits": 3, **LEARNING}, "awq cannot learn end to end"),
        ({**SIGNS, **LEARNING, "overrides": {"up_proj": {"tune_mode": "block"}}}, "belongs to the whole stage"),
        ({**SIGNS, "tune_steps": 3, "tune_mode": "together"}, "tune_mode"),
    ],
    ids=["no steps", "awq", "override", "unknown"],
)
def test_settings_that_are_refused(stage: dict[str, Any], words: str, calibration: Path) -> None:
    with pytest.raises(UserError, match=words):
        tiny_models.recipe_for(calibration, {"quantize": stage})


def test_it_must_be_the_only_stage(calibration: Path) -> None:
    ints = {"quantize": {"method": "gptq", "group": 16, **LEARNING}}
    with pytest.raises(UserError, match=r"learned end to end .* must be the only stage"):
        tiny_models.recipe_for(calibration, {"method": "wanda"}, ints)


def test_what_does_not_fit_into_memory_is_refused(
    half: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill_codes, "available_memory", lambda: 300_000)
    with pytest.raises(UserError, match=r"keeps 0\.0 GB in memory.*block"):
        tiny_models.run_recipe(recipe(calibration, SIGNS), half, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    by_block = tiny_models.recipe_for(calibration, {"quantize": {**SIGNS, **LEARNING, "tune_mode": "block"}})
    tiny_models.run_recipe(by_block, half, tmp_path / "out")
