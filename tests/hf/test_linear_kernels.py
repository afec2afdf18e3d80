"""When kernels of flash-linear-attention are used: stand-ins of them, right and wrong, on what looks like a GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import fla_stand_in
import pytest
import torch
from torch import Tensor

from compressor.hf import linear_kernels
from compressor.hf.linear_kernels import kernel_for, read_tokens
from compressor.mixers.chunked import Frame, Tokens, read_all

SCALE, FRAME = 0.5, Frame(16, 4, True, True)


def singles(tokens: int = 300, features: int = 5, decay: str = "scalar", dtype: torch.dtype = torch.float32) -> Tokens:
    """Random tokens: B = 2, Hk = 2, g = 2, d = 4, dv = 3."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(2, 2, *shape, generator=generator, dtype=torch.float64).to(dtype)

    log_decay = -drawn(tokens, features if decay == "vector" else 1)
    return Tokens(
        drawn(2, tokens, 4),
        drawn(tokens, 4),
        drawn(tokens, 3) - 0.5,
        torch.ones(2, tokens, dtype=torch.bool),
        drawn(2, tokens, features),
        drawn(tokens, features),
        log_decay,
    )


def agree(tokens: Tokens, tolerance: float) -> Tensor:
    """Compare what is read in either way with our operation; return the difference of the memories."""
    read, state = read_tokens(tokens, FRAME, scale=SCALE, coarse=True)
    wanted, after = read_all(tokens, FRAME, scale=SCALE)
    differences = [read.memory - wanted.memory, read.window - wanted.window, state["memory"] - after["memory"]]
    assert max(float(difference.abs().max()) for difference in differences) <= tolerance
    return differences[0]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine that looks like one with a GPU and with flash-linear-attention."""
    linear_kernels.proved_kernel.cache_clear()
    monkeypatch.delenv(linear_kernels.FLA_VARIABLE, raising=False)
    monkeypatch.setattr(linear_kernels, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(linear_kernels, "find_spec", lambda name: object())
    fla_stand_in.install(monkeypatch)
    yield monkeypatch
    linear_kernels.proved_kernel.cache_clear()


class Counted:
    """A kernel that counts its calls, and may change what the stand-in returns."""

    def __init__(self, kernel: Any, change: float = 0.0) -> None:
        self.kernel, self.change, self.calls = kernel, change, 0

    def __call__(self, **given: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        read, state = self.kernel(**given)
        return read * (1 + self.change), state


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_kernels_are_used_where_they_agree(
    gpu: pytest.MonkeyPatch, decay: str, caplog: pytest.LogCaptureFixture
) -> None:
    standing_in = fla_stand_in.chunk_gla if decay == "vector" else fla_stand_in.chunk_simple_gla
    counted = Counted(standing_in)
    fla_stand_in.install(gpu, **{standing_in.__name__: counted})
    tokens = singles(decay=decay)
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "compressor"):
        differences = [agree(tokens, 1e-4) for _ in range(3)]
    assert counted.calls == 4  # one of them to prove it
    assert all(difference.any() for difference in differences)  # rounding: another way has been taken
    assert [record.levelname for record in caplog.records] == ["INFO"] and "used" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)


def test_kernels_are_proved_in_inference_mode_and_when_learning(gpu: pytest.MonkeyPatch) -> None:
    counted = Counted(fla_stand_in.chunk_simple_gla)
    fla_stand_in.install(gpu, chunk_simple_gla=counted)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert kernel_for(singles()) is counted
    learning = singles()
    learning.key_features.requires_grad_()
    assert kernel_for(learning) is counted
    assert counted.calls == 2


@pytest.mark.parametrize("change", [0.1, float("nan")])
def test_kernels_that_compute_something_else_are_not_used(
    gpu: pytest.MonkeyPatch, change: float, caplog: pytest.LogCaptureFixture
) -> None:
    fla_stand_in.install(gpu, chunk_simple_gla=Counted(fla_stand_in.chunk_simple_gla, change))
    assert kernel_for(singles()) is None and kernel_for(singles()) is None
    assert len(caplog.records) == 1 and "not used, its outputs" in caplog.text


def test_kernels_with_wrong_gradients_are_used_for_inference_only(
    gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(**given: Any) -> Any:
        return fla_stand_in.chunk_simple_gla(**{**given, "k": given["k"] * 0.8 + given["k"].detach() * 0.2})

    fla_stand_in.install(gpu, chunk_simple_gla=wrong)
    assert kernel_for(singles()) is wrong
    learning = singles()
    learning.values.requires_grad_()
    assert kernel_for(learning) is None
    with torch.no_grad():
        assert kernel_for(learning) is wrong
    assert "not used, its gradients" in caplog.text


def test_kernels_that_fail_are_not_used(gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(**given: Any) -> Any:
        raise RuntimeError("0 active drivers ([]). There should only be one.\nand more")

    fla_stand_in.install(gpu, chunk_simple_gla=broken)
    for _ in range(2):
        agree(singles(), 0)
    assert [record.getMessage() for record in caplog.records] == [
        "flash-linear-attention: chunk_simple_gla, 5 features, inference: not used, it fails "
        "(RuntimeError: 0 active drivers ([]). There should only be one.)"
    ]


def test_ours_is_used_everywhere_else(gpu: pytest.MonkeyPatch) -> None:
    assert kernel_for(singles()) is not None
    assert kernel_for(singles(tokens=linear_kernels.FLA_FEWEST - 1)) is None
    assert kernel_for(singles(features=0)) is None
    assert kernel_for(singles(dtype=torch.float64)) is None
    counted = Counted(fla_stand_in.chunk_simple_gla)
    gpu.setattr(linear_kernels, "kernel_for", lambda tokens: counted)
    read_tokens(singles(), FRAME)  # a model that computes in fp32
    assert not counted.calls


def test_the_environment_variable_chooses(gpu: pytest.MonkeyPatch) -> None:
    gpu.setenv(linear_kernels.FLA_VARIABLE, "off")
    assert kernel_for(singles()) is None
    gpu.setenv(linear_kernels.FLA_VARIABLE, "yes")
    with pytest.raises(ValueError, match="COMPRESSOR_FLA=yes: expected auto or off"):
        kernel_for(singles())


def test_without_a_gpu_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str) -> Any:
        raise AssertionError(name)

    monkeypatch.setattr(linear_kernels, "import_module", never)
    monkeypatch.setattr(linear_kernels, "find_spec", never)
    agree(singles(), 0)


def test_without_the_package_ours_is_used_and_nothing_said(
    gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.setattr(linear_kernels, "find_spec", lambda name: None)
    assert kernel_for(singles()) is None
    assert not caplog.records
