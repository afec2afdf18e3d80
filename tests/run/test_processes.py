"""Linearization on several processes: blocks shared out, kills, errors, sharded models, launchers."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from compressor.engine.processes import RANKS, SIZES, rank, world_size
from compressor.engine.sharding import sharding_asked
from compressor.errors import UserError
from compressor.run import rounds

LAYERS = 3
TOKENS = tiny_models.LENGTH * 8  # of a step of 8 windows
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
START = """
import os, signal, sys, time
from pathlib import Path
from compressor.run import rounds
from compressor.engine import distill
from compressor.engine.processes import rank
from compressor.errors import UserError

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

{patch}
from compressor.cli.app import main
main()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.random_model("qwen2", num_hidden_layers=LAYERS, scale=0.3)
    return tiny_models.save(model, tmp_path_factory.mktemp("models") / "qwen2")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The bytes of a product may depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(calibration: Path, **stage: Any) -> Any:
    plain = {"method": "windowed", "window": 6, "sinks": 2, "tokens": 12 * TOKENS, "keep_attention": 1}
    return tiny_models.recipe_for(calibration, {"linearize": {**plain, "select": "error", **stage}})


def started(launcher: list[str], work: Path, wanted: Any, source: Path, patch: str = "", **environment: str) -> Any:
    """Carry out a recipe into ``work / "out"`` with other processes; ``patch`` is run in each of them before."""
    (work / "recipe.yaml").write_text(yaml.safe_dump(wanted.resolved()))
    (work / "start.py").write_text(START.format(patch=patch))
    command = [*launcher, str(work / "start.py"), "run", str(work / "recipe.yaml"),
               "--model", str(source), "-o", str(work / "out"), "-q"]  # fmt: skip
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=everything, timeout=300)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@given(st.integers(0, 12), st.sets(st.integers(0, 12)), st.integers(1, 5))
def test_rounds_give_every_process_one_block(blocks: int, kept: set[int], processes: int) -> None:
    parts = list(rounds.rounds(range(blocks), kept, processes))
    assert [block for part in parts for block, _ in part] == list(range(blocks))
    assert all((owner is None) == (block in kept) for part in parts for block, owner in part)
    owners = [[owner for _, owner in part if owner is not None] for part in parts]
    assert all(found == list(range(len(found))) for found in owners)
    assert all(len(found) == processes for found in owners[:-1])
    assert not owners or len(owners[-1]) <= processes


def test_launchers_say_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SIZES, *RANKS):
        monkeypatch.delenv(name, raising=False)
    assert (world_size(), rank()) == (1, 0)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert (world_size(), rank()) == (4, 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert (world_size(), rank()) == (2, 1)


def test_sharding_is_asked_for_by_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert not sharding_asked()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding_asked()
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(UserError, match="offload"):
        sharding_asked()


KILLED_FIRST = """
plain = rounds.transfer_block
def dying(runner, block, *rest):
    if block == 0:  # the first process: once the other one has finished its block
        done = Path(sys.argv[sys.argv.index("-o") + 1] + ".partial") / "mixer-00001.json"
        while not done.exists():
            time.sleep(0.05)
        kill()
    return plain(runner, block, *rest)
rounds.transfer_block = dying
"""

KILLED_AGAIN = """
plain = rounds.transfer_block
def dying(runner, block, *rest):
    assert block != 1, "taught already"
    if block == 2:
        kill()
    return plain(runner, block, *rest)
rounds.transfer_block = dying
"""


@pytest.mark.slow
def test_blocks_learn_the_same_whoever_teaches_them_and_whatever_is_killed(
    source: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    wanted = recipe(calibration, train="none")
    whole = tiny_models.run_recipe(wanted, source, tmp_path / "whole")
    partial = tmp_path / "out.partial"
    assert started(TORCHRUN, tmp_path, wanted, source, KILLED_FIRST).returncode
    assert (partial / "states-00000.safetensors").exists() is False
    first = (partial / "mixer-00001.json").stat().st_mtime_ns
    assert not (partial / "mixer-00000.json").exists()
    done = started(TORCHRUN, tmp_path, wanted, source, KILLED_AGAIN)
    assert done.returncode and "taught already" not in done.stderr
    assert (partial / "mixer-00001.json").stat().st_mtime_ns == first
    assert (partial / "states-00002.safetensors").exists()

    taught, plain = [], rounds.transfer_block

    def noting(runner: Any, block: int, *rest: Any) -> Any:
        taught.append(block)
        return plain(runner, block, *rest)

    monkeypatch.setattr(rounds, "transfer_block", noting)
    again = tiny_models.run_recipe(wanted, source, tmp_path / "out")
    assert taught == [2]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert again.linearization == whole.linearization
    assert not partial.exists()


@pytest.mark.slow
def test_three_processes_of_which_none_waits_for_one_that_fails(
    source: Path, calibration: Path, tmp_path: Path, one_thread: None
) -> None:
    """Started by hand: no launcher ends the others."""
    wanted = recipe(calibration, train="none", keep_layers=[1])
    failing = """
plain = rounds.transfer_block
def failing(runner, block, *rest):
    if block == 2 and rank() == 1 and "fail" in os.environ:
        raise UserError("block 2 does not want to learn", fix="ask it kindly")
    return plain(runner, block, *rest)
rounds.transfer_block = failing
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(wanted.resolved()))
    (tmp_path / "start.py").write_text(START.format(patch=failing))
    command = [sys.executable, str(tmp_path / "start.py"), "run", str(tmp_path / "recipe.yaml"),
               "--model", str(source), "-o", str(tmp_path / "out"), "-q"]  # fmt: skip

    def start(**more: str) -> list[tuple[int, str]]:
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen(command, env={**os.environ, **told, **more, "RANK": str(number)}, stderr=subprocess.PIPE)
            for number in range(3)
        ]
        try:
            return [(process.wait(240), process.stderr.read().decode()) for process in running if process.stderr]
        finally:
            for process in running:
                process.kill()

    ends = start(fail="yes")
    assert [code for code, _ in ends] == [2, 2, 2]
    assert all("block 2 does not want to learn; ask it kindly" in words for _, words in ends)
    assert all(code == 0 for code, _ in start())
    tiny_models.run_recipe(wanted, source, tmp_path / "one")
    assert weights(tmp_path / "out") == weights(tmp_path / "one")


SHARDED = """
distill.SAVE_EVERY = 0.0
plain, steps = distill._step, []
def step(leg, model, *rest):
    from torch.distributed.tensor import DTensor
    (dense,) = [cell.cell_contents for cell in leg.teacher.__closure__ if hasattr(cell.cell_contents, "parameters")]
    for parameter in [*dense.parameters(), *model.parameters()]:
        assert isinstance(parameter, DTensor) and parameter._local_tensor.numel() < parameter.numel()
    steps.append(0)
    if len(steps) == FATAL:
        kill()
    return plain(leg, model, *rest)
distill._step = step
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "train"), [("windowed", "lora"), ("mamba2", "full")])
def test_sharded_models_learn_what_a_whole_one_learns(
    source: Path, calibration: Path, tmp_path: Path, method: str, train: str, one_thread: None
) -> None:
    own = {"window": 6, "sinks": 2} if method == "windowed" else {}
    stage = {"method": method, "tokens": 12 * TOKENS, "train": train, "full_rate": 1e-3, "keep_layers": [1], **own}
    stage["gradient_checkpointing"] = train == "full"
    wanted = tiny_models.recipe_for(calibration, {"linearize": stage})
    one = tiny_models.run_recipe(wanted, source, tmp_path / "one")
    launcher = [*LAUNCH, "--use_fsdp", "--fsdp_version", "2", "--main_process_port", "0"]
    assert started(launcher, tmp_path, wanted, source, SHARDED.replace("FATAL", "4")).returncode
    saved = torch.load(tmp_path / "out.partial" / "distill.pt", weights_only=True)
    assert saved["step"] == 3
    if train == "lora":
        done = started(launcher, tmp_path, wanted, source, SHARDED.replace("FATAL", "0"))
        assert done.returncode == 0, done.stderr[-2000:]
    else:  # what sharded processes have saved, a single one takes up
        report = tiny_models.run_recipe(wanted, source, tmp_path / "out")
        assert report.linearization is not None and one.linearization is not None
        assert len(report.linearization.distillation.curve) == len(one.linearization.distillation.curve)
    first, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "out"))
    before = load_file(source / "model.safetensors")
    moved = max(float((first[name] - before[name]).abs().max()) for name in before.keys() & first.keys())
    assert moved > 3e-4
    assert max(float((first[name] - other[name]).abs().max()) for name in first) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs MPI")
def test_processes_that_mpi_starts(source: Path, calibration: Path, tmp_path: Path, one_thread: None) -> None:
    wanted = recipe(calibration, keep_layers=[1])
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    launcher = [*LAUNCH, "--cpu", "--mpirun_hostfile", str(tmp_path / "hosts")]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    two = "from compressor.engine.processes import world_size\nassert world_size() == 2"
    done = started(launcher, tmp_path, wanted, source, two, **root)
    assert done.returncode == 0, done.stderr[-2000:]
    tiny_models.run_recipe(wanted, source, tmp_path / "one")
    one, out = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "out"))
    assert max(float((one[name] - out[name]).abs().max()) for name in one) < 1e-5
