"""What ``compressor doctor`` says of the hub."""

from __future__ import annotations

from collections.abc import Callable

import huggingface_hub
import pytest
from command_line import Command
from loopback import Hub


@pytest.mark.parametrize(
    ("value", "words", "wrong"),
    [
        ("hf_me", "accepted, of me", False),
        ("hf_wrong", "WRONG: refused", True),
        (None, "none: public models can be fetched", False),
    ],
)
def test_tokens(
    value: str | None, words: str, wrong: bool, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: value)
    done = command("doctor")
    lines = {line.split("  ")[0]: line for line in done.out.splitlines()}
    assert lines["hub"].endswith(f"{hub.url} answers") and words in lines["hub token"]
    assert ("WRONG" in lines["hub"] + lines["hub token"]) == wrong
    assert done.code == 1 or not wrong  # other things may be wrong with this machine
    assert hub.log == ["GET /api/whoami-v2"]


def test_no_hub_is_nothing_wrong(
    hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch, token: Callable[[str], None]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = command("doctor")
    told = next(line for line in done.out.splitlines() if line.startswith("hub "))
    assert "http://127.0.0.1:9 cannot be reached" in told and "WRONG" not in told and "hub token" not in done.out


def test_a_hub_in_trouble_is_named(hub: Hub, command: Command) -> None:
    hub.fail("whoami", 500)
    done = command("doctor")
    assert "answers, but with status 500" in done.out and "hub token" not in done.out
