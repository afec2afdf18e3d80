"""``compressor doctor`` and the help of ``compressor kernels``."""

from __future__ import annotations

import json
import socket

import pytest
from command_line import Command
from huggingface_hub import constants

import compressor


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("offline, the doctor stays off the network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("COMPRESSOR_KERNELS", "COMPRESSOR_ACTIVATIONS"):
        monkeypatch.delenv(name, raising=False)


def test_one_line_a_fact(command: Command) -> None:
    lines = command("doctor").out.splitlines()
    facts = {line[:22].strip(): line[22:].strip() for line in lines}
    assert facts["compressor"].startswith(compressor.__version__)
    for name in ("python", "torch", "transformers", "accelerate", "cpu", "kernels", "packed matrices", "disk here"):
        assert facts[name]
    assert facts["COMPRESSOR_KERNELS"] == "not set" and facts["activations"] == "int8"
    assert facts["packed matrices"].startswith("by ")
    assert facts["hub"].endswith("is not asked: HF_HUB_OFFLINE is set")


def test_json_says_the_same(command: Command) -> None:
    text = command("doctor").out
    for fact in json.loads(command("doctor", "--json").out):
        assert fact["name"] in text and isinstance(fact["wrong"], bool)
        if fact["name"] not in ("cpu", "disk here", "disk of hub cache"):  # these change
            assert fact["value"] in text


@pytest.mark.parametrize(("name", "value"), [("COMPRESSOR_KERNELS", "avx3"), ("COMPRESSOR_ACTIVATIONS", "int7")])
def test_what_is_wrong_is_said_and_ends_in_an_error(
    name: str, value: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    result = command("doctor")
    assert result.code == 1 and f"WRONG: {name}={value}: expected" in result.out and not result.err


def test_a_forced_way_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_KERNELS", "dense")
    assert "by dense: forced by COMPRESSOR_KERNELS" in command("doctor").out


def test_an_old_package_is_wrong(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.run import doctor

    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=99", "nowhere-to-be-found>=1", 'ruff; extra == "dev"'])
    result = command("doctor")
    assert result.code == 1
    assert ", but >=99 is needed" in result.out and "WRONG: not installed, >=1 is needed" in result.out
    assert "ruff" not in result.out


def test_help_of_kernels(command: Command) -> None:
    for words in (("kernels",), ("kernels", "--help"), ("kernels", "build", "--help")):
        result = command(*words)
        assert result.code == 0 and "build" in result.out and not result.err
