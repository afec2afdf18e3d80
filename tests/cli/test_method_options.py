"""Flags made from settings: what one method takes is not refused because another one does not."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

import pytest
import typer

from compressor.cli.app import app
from compressor.run.recipe import STAGES

CHOICES = [
    (kind, method, name, word)
    for kind, classes in STAGES.items()
    for method, settings in classes.items()
    for name, info in settings.model_fields.items()
    if get_origin(info.annotation) is Literal
    for word in get_args(info.annotation)
    if not isinstance(word, bool)
]


@pytest.mark.parametrize(("kind", "method", "name", "word"), CHOICES)
def test_every_word_of_every_choice_can_be_typed(kind: str, method: str, name: str, word: str | int) -> None:
    command = typer.main.get_command(app).commands[kind]  # type: ignore[attr-defined]
    words = ["embedded", "--method", method, f"--{name.replace('_', '-')}", str(word)]
    given = command.make_context(kind, words).params[name]
    assert str(given) == str(word)
