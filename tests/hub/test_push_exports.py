"""Folders that ``compressor export`` has written, pushed with the real client to a hub on this machine, and fetched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from command_line import Command
from foreign import need_package
from loopback import Hub
from test_push import logits

from compressor.engine.checkpoint import resolve_model
from compressor.errors import UserError
from compressor.report.files import read_report
from compressor.run.export import exporter
from compressor.run.push_checks import check_folder
from compressor.run.recipe import make_recipe
from compressor.run.stream import Options, compress

NEEDS = {
    "dense": [],
    "compressed-tensors": ["compressed_tensors"],
    "gguf": ["gguf"],
    "mlx": ["mlx", "mlx_lm"],
    "gptq": [],
}
"""Form -> packages that write or load it."""

WEIGHTS = {"gguf": "quantized-Q8_0.gguf"}
Exports = Callable[[str], Path]


def front(card: str) -> dict[str, object]:
    """The head of a card."""
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local folder with a card and a licence, in integers with zero points. Not to be written to."""
    base = tmp_path_factory.mktemp("quantized")
    shutil.copytree(resolve_model("embedded"), base / "source")
    (base / "source" / "README.md").write_text(
        "---\nlicense: mit\nlanguage: en\nbase_model: /home/ann/m\n---\n# Mine\n"
    )
    (base / "source" / "LICENSE").write_text("free")
    stages = [{"quantize": {"method": "rtn", "bits": 4, "group": 32, "asymmetric": True}}]
    texts = {"texts": ["embedded-heldout"], "windows": 2, "seqlen": 64}
    recipe = make_recipe({"stages": stages, "evaluation": texts})
    compress(recipe, str(base / "source"), Options(output=base / "quantized", command="compressor quantize source"))
    return base / "quantized"


@pytest.fixture(scope="session")
def exports(quantized: Path) -> Exports:
    """Gives the export in a form, made and tried once. Not to be written to."""

    def export(form: str) -> Path:
        for package in NEEDS[form]:
            need_package(package)
        folder = quantized.parent / form
        if not folder.exists():
            exporter(form)(str(quantized), folder)
        return folder

    return export


@pytest.fixture(scope="session")
def packed_logits(quantized: Path) -> torch.Tensor:
    """What the packed folder computes, in a fresh process."""
    return logits(str(quantized), quantized.parent / "near.pt", dtype="'auto'")


@pytest.mark.parametrize("form", NEEDS)
def test_every_form_goes_up_as_it_is(form: str, hub: Hub, exports: Exports, command: Command) -> None:
    folder, weights = exports(form), WEIGHTS.get(form, "model.safetensors")
    dry = command("push", folder, "me/tiny", "--dry-run")
    assert dry.code == 0 and "dry run: nothing was uploaded" in dry.out and weights in dry.out, dry.err
    assert not hub.repos and not hub.asked("^(POST|PUT)")
    done = command("push", folder, "me/tiny")
    assert done.code == 0, done.err
    there, here = hub.files("me/tiny"), {file.name: file.read_bytes() for file in folder.iterdir()}
    assert there.keys() == here.keys() | {"SHA256SUMS"} and there["LICENSE"] == b"free"
    assert {name for name in here if there[name] != here[name]} == {"README.md"}
    digest = hashlib.sha256(here[weights]).hexdigest()
    assert there["SHA256SUMS"].decode() == f"{digest}  {weights}\n"
    for name, data in there.items():
        assert name == weights or str(folder.parents[2]).encode() not in data, f"{name} tells of this machine"
    assert ("no program has loaded it yet" in done.out) == (form == "gptq")
    assert "nothing to upload" in command("push", folder, "me/tiny").out


HEADS: dict[str, tuple[str | None, str | None]] = {
    "dense": ("transformers", None),
    "compressed-tensors": ("transformers", "compressed-tensors"),
    "gguf": (None, "gguf"),
    "mlx": ("mlx", "mlx"),
    "gptq": (None, "gptq"),
}
"""Form -> library and tag."""

TRIED = {
    "dense": "With transformers (",
    "compressed-tensors": "With transformers + compressed-tensors (",
    "gguf": "With transformers + gguf, which unpacks it (",
    "mlx": "With mlx-lm (",
}
COMMANDS = {
    "dense": 'AutoModelForCausalLM.from_pretrained("me/tiny")',
    "compressed-tensors": 'AutoModelForCausalLM.from_pretrained("me/tiny")',
    "gguf": "llama-server -m tiny/quantized-Q8_0.gguf\n",
    "mlx": "mlx_lm.generate --model me/tiny --prompt",
}


@pytest.mark.parametrize("form", NEEDS)
def test_the_card_on_the_hub(form: str, hub: Hub, exports: Exports, command: Command) -> None:
    folder = exports(form)
    assert command("push", folder, "me/tiny").code == 0
    card = hub.files("me/tiny")["README.md"].decode()
    head, (library, tag) = front(card), HEADS[form]
    assert head["license"] == "mit" and head["language"] == "en" and head["pipeline_tag"] == "text-generation"
    assert head.get("library_name") == library
    assert head["tags"] == [
        "compressor",
        *({"compressed-tensors"} & {tag}),
        "rtn",
        *({tag} - {None, "compressed-tensors"}),
    ]
    assert "base_model" not in head and "base_model_relation" not in head, "a folder of this machine is no model there"
    assert f"# quantized, {read_report(folder).exported.form}".replace("_", "\\_") in card  # type: ignore[union-attr]
    size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf"))
    assert f"**{100 * size / read_report(folder).size.source_bytes:.1f}" in card, "the bytes are those of this form"
    assert "PATH" not in card and "## Checksums" in card and "group: 32" in card
    assert "| embedded-heldout | compressed: rtn 4-bit g32 asymmetric |" in card
    assert TRIED.get(form, "**No program has loaded this folder yet.**") in card
    assert COMMANDS.get(form, "quant_method: gptq") in card
    assert ("hf download me/tiny --local-dir tiny\n" in card) == (form == "gguf")


@pytest.mark.parametrize("form", ["dense", "compressed-tensors"])
def test_loaded_from_the_hub_it_computes_the_same(
    form: str, hub: Hub, exports: Exports, packed_logits: torch.Tensor, command: Command, tmp_path: Path
) -> None:
    """In a process that has not imported compressor, in the dtype of the files."""
    assert command("push", exports(form), "me/tiny").code == 0
    far = logits("me/tiny", tmp_path / "far.pt", hub, imports="", dtype="'auto'")
    assert far.dtype == torch.bfloat16 and torch.equal(far, packed_logits)


def test_the_commands_for_a_gguf_file_are_true(hub: Hub, exports: Exports, command: Command, tmp_path: Path) -> None:
    """It is fetched as the card says, and by the client, with the checksum that the hub has; then it can be read."""
    folder = exports("gguf")
    assert command("push", folder, "me/tiny", "--revision", "q8").code == 0
    card = hub.files("me/tiny", "q8")["README.md"].decode()
    (line,) = [line for line in card.splitlines() if line.startswith("hf download")]
    assert line == "hf download me/tiny --revision q8 --local-dir tiny"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    run = [str(Path(sys.executable).with_name("hf")), *line.split()[1:]]
    subprocess.run(run, check=True, env=env, cwd=tmp_path, capture_output=True)
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "tiny", capture_output=True, text=True)
    assert checked.stdout == "quantized-Q8_0.gguf: OK\n"
    read: dict[str, object] = {}
    exec(next(code for code in card.split("```python\n") if code.startswith("from gguf")).split("```")[0].replace(
        '"tiny/', f'"{tmp_path}/tiny/'), read)  # fmt: skip
    assert len(read["tensors"]) == 29  # type: ignore[arg-type]
    from huggingface_hub import hf_hub_download

    fetched = Path(hf_hub_download("me/tiny", "quantized-Q8_0.gguf", revision="q8"))
    assert fetched.read_bytes() == (folder / "quantized-Q8_0.gguf").read_bytes()


def test_mlx_lm_takes_no_revisions(hub: Hub, exports: Exports, command: Command) -> None:
    done = command("push", exports("mlx"), "me/tiny", "--revision", "q4")
    card = hub.files("me/tiny", "q4")["README.md"].decode()
    for text in (card, done.out):
        assert "hf download me/tiny --revision q4 --local-dir tiny\n" in text
        assert "mlx_lm.generate --model tiny --prompt" in text


@pytest.mark.parametrize("form", NEEDS)
def test_a_folder_that_lacks_a_file_is_refused_by_name(form: str, exports: Exports, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exports(form), tmp_path / form))
    assert {piece.name for piece in check_folder(folder).pieces} == {file.name for file in folder.iterdir()}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        file.unlink()
        if file.name == "README.md":  # a person may write another one
            assert check_folder(folder)
        else:
            with pytest.raises(UserError) as caught:
                check_folder(folder)
            gone = "no report.json" if file.name == "report.json" else f"{file.name} is missing in {form}"
            assert gone in str(caught.value)
        file.write_bytes(data)
    weights = folder / WEIGHTS.get(form, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(UserError, match=rf"{weights.name}.* byte"):
        check_folder(folder)


def test_an_export_of_what_compressor_has_not_changed(hub: Hub, command: Command, tmp_path: Path) -> None:
    need_package("gguf")
    assert command("export", "embedded", tmp_path / "plain", "--format", "gguf", "--no-verify").code == 0
    done = command("push", tmp_path / "plain", "me/tiny")
    assert done.code == 2 and "is no model that compressor has changed; `hf upload" in done.err


@pytest.mark.parametrize("source", ["org/base", "embedded"])
def test_the_base_of_an_export(source: str, quantized: Path, tmp_path: Path) -> None:
    """A model of the hub is named, with what was done to it; the embedded one is not on the hub."""
    folder = Path(shutil.copytree(quantized, tmp_path / "quantized"))
    report = json.loads((folder / "report.json").read_text())
    report["model"]["source"] = source
    (folder / "report.json").write_text(json.dumps(report))
    exporter("gptq")(str(folder), tmp_path / "out")
    head = front((tmp_path / "out" / "README.md").read_text())
    wanted = {"base_model": "org/base", "base_model_relation": "quantized"} if source == "org/base" else {}
    assert {key: head[key] for key in ("base_model", "base_model_relation") if key in head} == wanted


def test_an_export_of_a_model_of_the_hub_has_its_name(
    hub: Hub, quantized: Path, command: Command, tmp_path: Path
) -> None:
    assert command("push", quantized, "me/tiny").code == 0
    done = command("export", "me/tiny", tmp_path / "out", "--format", "gptq")
    assert done.code == 0 and "no program has loaded it yet" in done.out, done.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\n# me/tiny, gptq\n" in card and str(tmp_path) not in card
    assert check_folder(tmp_path / "out")
