"""What ``compressor doctor`` says of the hub."""

from __future__ import annotations

from collections.abc import Callable

import huggingface_hub
import pytest
from command_line import Command
from loopback import Hub


@pytest.mark.parametrize(
    ("value", "words", "code"),
    [
        ("hf_me", "accepted, of me", 0),
        ("hf_wrong", "WRONG: refused", 1),
        (None, "none: public models can be fetched", 0),
    ],
)
def test_tokens(
    value: str | None, words: str, code: int, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: value)
    done = command("doctor")
    lines = {line.split("  ")[0]: line for line in done.out.splitlines()}
    assert lines["hub"].endswith(f"{hub.url} answers") and words in lines["hub token"]
    assert done.code == code
    assert hub.log == ["GET /api/whoami-v2"]


def test_no_hub_is_nothing_wrong(
    hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch, token: Callable[[str], None]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = command("doctor")
    assert done.code == 0 and "http://127.0.0.1:9 cannot be reached" in done.out and "hub token" not in done.out


def test_a_hub_in_trouble_is_named(hub: Hub, command: Command) -> None:
    hub.fail("whoami", 500)
    done = command("doctor")
    assert done.code == 0 and "answers, but with status 500" in done.out and "hub token" not in done.out
