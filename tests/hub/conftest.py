"""A hub on this machine, the client pointed at it, and a small pruned model to upload."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loopback import Account, Hub, serving

from compressor.engine.checkpoint import resolve_model
from compressor.run.recipe import make_recipe
from compressor.run.stream import Options, compress


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running hub with three accounts; huggingface_hub in this process talks to it, with a cache of its own."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http, disable_progress_bars

    accounts = {"hf_me": Account("me", orgs=("team",)), "hf_reader": Account("me", "read"), "hf_you": Account("you")}
    disable_progress_bars()  # as the command line lets the client find it, where output is a log
    with serving(Hub(accounts)) as running:
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # what it waits before it tries again
        yield running


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the token of this process."""
    return lambda value: monkeypatch.setenv("HF_TOKEN", value)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, pruned and packed. Not to be written to."""
    folder = tmp_path_factory.mktemp("made") / "pruned"
    stages = [{"prune": {"method": "magnitude", "sparsity": 0.5}}]
    recipe = make_recipe({"stages": stages, "evaluation": {"texts": ["none"]}})
    compress(recipe, "embedded", Options(output=folder, command="compressor prune embedded -o pruned"))
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The same, to be spoiled."""
    return Path(shutil.copytree(made, tmp_path / "pruned"))


@pytest.fixture(scope="session")
def embedded_files() -> dict[str, bytes]:
    """The files of the embedded model."""
    return {file.name: file.read_bytes() for file in resolve_model("embedded").iterdir() if file.is_file()}
