"""Paths as they are shown to others: no folder of a person, and no two files under one name."""

from __future__ import annotations

import pytest

from compressor.cli.common import typed_command
from compressor.run.places import shortened


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setenv("HOME", "/srv/people/ann")
    monkeypatch.setattr("sys.argv", ["compressor", *words])
    return typed_command().removeprefix("compressor ")


def test_two_files_of_one_name_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    same = typed(monkeypatch, "evaluate", "/d/m", "--eval-tasks", "/d/x/q/a.json,/d/y/q/a.json", "--text=/d/x/q/a.json")
    assert same == "evaluate m --eval-tasks x/q/a.json,y/q/a.json --text=x/q/a.json"
    beside = typed(monkeypatch, "prune", "out", "-o", "/d/out", "--calibration", "/d/t.txt:field=text@2")
    assert beside == "prune out -o d/out --calibration t.txt:field=text@2", "a path beside a word that looks like it"


def test_no_home_folder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed(monkeypatch, "prune", "/srv/people/ann/m", "-o/home/bob/m") == "prune 'm (1)' '-om (2)'"
    assert typed(monkeypatch, "prune", "/srv/people/ann/a/m", "-o", "/home/bob/b/m") == "prune a/m -o b/m"
    assert typed(monkeypatch, "prune", "/srv/people/ann", "-o/root/x") == "prune '~' -ox"


def test_paths_without_namesakes_keep_their_last_part() -> None:
    found = shortened(["/data/a.txt", "/data/b.txt", "/data/a.txt", "/home/ann/data/c.txt/"])
    assert dict(found) == {"/data/a.txt": "a.txt", "/data/b.txt": "b.txt", "/home/ann/data/c.txt/": "c.txt"}
    assert shortened(["C:\\Users\\ann\\m", "C:\\m"]) == {"C:\\Users\\ann\\m": "m (1)", "C:\\m": "m (2)"}
