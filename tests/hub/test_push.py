"""``compressor push`` with the real client against a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Command
from loopback import Hub

Token = Callable[[str], None]

LOAD = """
import json, sys, torch
{imports}
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype={dtype}, **json.loads(sys.argv[2])).eval()
assert AutoTokenizer.from_pretrained(sys.argv[1], **json.loads(sys.argv[2]))("The")["input_ids"]
with torch.no_grad():
    torch.save(model(torch.arange(32)[None]).logits, sys.argv[3])
"""


def logits(
    name: str,
    target: Path,
    hub: Hub | None = None,
    *,
    imports: str = "import compressor",
    dtype: str = "torch.float32",
    **how: object,
) -> torch.Tensor:
    """What a fresh process computes that loads ``name``, from the hub where one is given."""
    away = {"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    places = {"HF_HOME": str(target.parent / "home"), "HF_TOKEN": "hf_me"}
    code = LOAD.format(imports=imports, dtype=dtype)
    command = [sys.executable, "-c", code, name, json.dumps(how), str(target)]
    done = subprocess.run(command, env={**os.environ, **away, **places}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(target)


def test_a_log_gets_no_bars(hub: Hub, made: Path, tmp_path: Path) -> None:
    """Nor what else a terminal would be steered by, in an upload and in a download."""
    places = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_me", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    # checksums come along, the page stays
    told = rf"fetching me/tiny@main: {len(list(made.iterdir()))} files, 1\.\d+ MB\n"
    for words, said in ((["push", made, "me/tiny"], ""), (["explain", "me/tiny"], told)):
        command = [sys.executable, "-m", "compressor.cli.app", *map(str, words)]
        done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True)
        assert done.returncode == 0 and re.fullmatch(said, done.stderr), done.stderr
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout)


def test_a_narrow_table_loses_nothing(hub: Hub, made: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in a table as wide as COLUMNS says; address and command in one piece, to be copied."""
    monkeypatch.setenv("COLUMNS", "32")
    shown = command("push", made, "me/with-a-name-that-is-rather-long").out
    assert "\x1b" not in shown
    table = shown[: shown.index("\n\n")].splitlines()
    rule = next(place for place, line in enumerate(table) if line.startswith("──"))
    names = {name for line in table[rule + 1 :] if (name := line.split()[0])}
    assert names >= {file.name for file in made.iterdir() if len(file.name) < 20}
    assert all(len(line) <= 32 for line in table)
    assert f"\n{hub.url}/me/with-a-name-that-is-rather-long\n" in shown
    assert 'AutoModelForCausalLM.from_pretrained("me/with-a-name-that-is-rather-long")\n' in shown


def test_there_and_back(hub: Hub, made: Path, command: Command, tmp_path: Path) -> None:
    """Uploaded, and loaded by its name in a fresh process, it computes the same."""
    before = {file.name: file.read_bytes() for file in made.iterdir()}
    done = command("push", made, "me/tiny")
    assert done.code == 0, done.err
    there = hub.files("me/tiny")
    assert there.keys() == before.keys() | {"SHA256SUMS"}
    assert {name for name in before if there[name] != before[name]} == {"README.md"}
    digest = hashlib.sha256(before["model.safetensors"]).hexdigest()
    assert there["SHA256SUMS"].decode() == f"{digest}  model.safetensors\n"
    card = there["README.md"].decode()
    assert 'from_pretrained("me/tiny"' in card and '"PATH"' not in card and digest in card
    assert not hub.repos["me/tiny"].private
    assert "11 files" in done.out and f"{hub.url}/me/tiny\n" in done.out and 'from_pretrained("me/tiny")' in done.out
    assert {file.name: file.read_bytes() for file in made.iterdir()} == before, "the folder is left alone"
    assert hub.asked("GET .*/xet-write-token/main") and hub.asked("PUT /lfs/"), "asked for Xet, then sent by LFS"
    far = logits("me/tiny", tmp_path / "far.pt", hub)
    assert torch.equal(far, logits(str(made), tmp_path / "near.pt"))


@pytest.mark.slow
def test_the_reader_file_from_the_hub(hub: Hub, made: Path, command: Command, tmp_path: Path) -> None:
    assert command("push", made, "me/tiny").code == 0
    far = logits("me/tiny", tmp_path / "far.pt", hub, imports="", trust_remote_code=True)
    assert torch.equal(far, logits(str(made), tmp_path / "near.pt"))


def test_again_is_nothing(hub: Hub, made: Path, command: Command) -> None:
    assert command("push", made, "me/tiny").code == 0
    commits, asked = len(hub.repos["me/tiny"].commits), len(hub.asked("^(PUT|POST) "))
    done = command("push", made, "me/tiny")
    assert done.code == 0 and "nothing to upload" in done.out
    assert len(hub.repos["me/tiny"].commits) == commits and len(hub.asked("^(PUT|POST) ")) == asked


def test_a_dropped_connection_is_tried_again(hub: Hub, made: Path, command: Command) -> None:
    hub.fail("^PUT /lfs/", "drop", after=100_000)
    done = command("push", made, "me/tiny")
    assert done.code == 0, done.err
    assert len(hub.asked("^PUT /lfs/")) == 2


def test_after_an_interruption_the_rest_is_sent(hub: Hub, made: Path, command: Command, copied: Path) -> None:
    """Two weight files; the second never gets through. The next call sends the second only."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    oids = []
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, copied / file)
        oids.append(hashlib.sha256((copied / file).read_bytes()).hexdigest())
    (copied / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, some in parts.items() for name in some}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.fail(f"^PUT /lfs/{oids[1]}", "drop", after=10_000, times=6)
    broken = command("push", copied, "me/tiny")
    assert broken.code == 2
    assert broken.err.strip().splitlines()[-1].endswith("broke off; the same command goes on where it stopped")
    assert hub.files("me/tiny") == {}, "nothing half-uploaded is to be seen"
    again = command("push", copied, "me/tiny")
    assert again.code == 0, again.err
    assert len(hub.asked(f"^PUT /lfs/{oids[0]}")) == 1, "what was there is not sent again"
    assert hub.files("me/tiny").keys() >= parts.keys()


def test_a_lost_commit_is_made_again(hub: Hub, made: Path, command: Command) -> None:
    hub.fail("^POST .*/commit/", 500)
    broken = command("push", made, "me/tiny")
    assert broken.code == 2 and "has a problem of its own (status 500)" in broken.err
    assert command("push", made, "me/tiny").code == 0
    assert len(hub.asked("^PUT /lfs/")) == 1


def test_large_files_go_in_parts(hub: Hub, made: Path, command: Command) -> None:
    hub.part_bytes = 250_000
    done = command("push", made, "me/tiny")
    assert done.code == 0, done.err
    assert len(hub.asked(r"^PUT /lfs/\w+/\d+")) == 4
    assert hub.files("me/tiny")["model.safetensors"] == (made / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("value", "name", "words"),
    [
        ("hf_wrong", "me/tiny", "does not accept the token"),
        ("hf_reader", "me/tiny", "the token of me may only read"),
        ("hf_you", "me/tiny", "you may not write to 'me' (may to: you)"),
        ("hf_me", "tiny", "'tiny' is no name on a hub"),
        ("hf_me", "me/ti--ny", "is no name that a hub allows"),
    ],
)
def test_who_may_not(value: str, name: str, words: str, hub: Hub, made: Path, command: Command, token: Token) -> None:
    token(value)
    done = command("push", made, name)
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1 and not hub.repos


def test_no_token_and_no_network(hub: Hub, made: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    away = command("push", made, "me/tiny", "--endpoint", "http://127.0.0.1:9")
    assert away.code == 2 and "cannot reach http://127.0.0.1:9" in away.err and away.err.count("\n") == 1
    assert "is no address of a hub" in command("push", made, "me/tiny", "--endpoint", "hub.example").err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "there is no token to upload with; set HF_TOKEN" in command("push", made, "me/tiny").err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in command("push", made, "me/tiny").err
    assert not hub.log


def test_a_name_that_is_taken(hub: Hub, made: Path, copied: Path, command: Command) -> None:
    hub.put("me/theirs", {"config.json": b"{}", "model.safetensors": b"other"})
    theirs = command("push", made, "me/theirs", "--overwrite")
    assert theirs.code == 2 and "was not written by compressor" in theirs.err
    assert command("push", made, "me/tiny").code == 0
    (copied / "README.md").write_text("---\nlicense: mit\n---\nedited")
    (copied / "recipe.yaml").unlink()
    other = command("push", copied, "me/tiny")
    assert other.code == 2 and "holds another upload of compressor" in other.err and "--overwrite" in other.err
    listed = command("push", copied, "me/tiny", "--overwrite", "--dry-run")
    assert listed.code == 0 and "recipe.yaml: only on the hub, is removed" in listed.out
    assert hub.files("me/tiny")["recipe.yaml"]
    replaced = command("push", copied, "me/tiny", "--overwrite")
    assert replaced.code == 0, replaced.err
    assert "recipe.yaml" not in hub.files("me/tiny") and b"edited" in hub.files("me/tiny")["README.md"]
    assert len(hub.asked("^PUT /lfs/")) == 1, "the weights are the same"


def test_private_and_organizations(hub: Hub, made: Path, command: Command) -> None:
    assert "(new, private)" in command("push", made, "team/tiny", "--private").out
    assert hub.repos["team/tiny"].private
    assert command("push", made, "me/tiny").code == 0
    public = command("push", made, "me/tiny", "--private")
    assert public.code == 2 and "me/tiny is there already, and public" in public.err


def test_branches(hub: Hub, made: Path, copied: Path, command: Command) -> None:
    assert command("push", made, "me/tiny").code == 0
    (copied / "recipe.yaml").unlink()
    hub.fail("^POST .*/commit/half", 500)
    assert command("push", copied, "me/tiny", "--revision", "half").code == 2
    done = command("push", copied, "me/tiny", "--revision", "half")
    assert done.code == 0, done.err
    assert "recipe.yaml" not in hub.files("me/tiny", "half") and "recipe.yaml" in hub.files("me/tiny")
    assert f"{hub.url}/me/tiny/tree/half" in done.out
    assert 'from_pretrained("me/tiny", revision="half")' in hub.files("me/tiny", "half")["README.md"].decode()
    assert "nothing to upload" in command("push", copied, "me/tiny", "--revision", "half").out


def test_pull_requests(hub: Hub, made: Path, copied: Path, command: Command, token: Token) -> None:
    assert command("push", made, "me/tiny").code == 0
    token("hf_you")
    (copied / "README.md").write_text("---\nlicense: mit\n---\nbetter")
    done = command("push", copied, "me/tiny", "--create-pr", "-m", "a better card")
    assert done.code == 0, done.err
    assert f"{hub.url}/me/tiny/discussions/1\n" in done.out
    assert b"better" in hub.files("me/tiny", "refs/pr/1")["README.md"]
    assert b"better" not in hub.files("me/tiny")["README.md"]
    assert "to propose a change to" in command("push", copied, "me/none", "--create-pr").err
    both = command("push", copied, "me/tiny", "--create-pr", "--revision", "x")
    assert both.code == 2 and "leave --revision or --create-pr out" in both.err


def test_a_dry_run_writes_nothing(hub: Hub, made: Path, command: Command) -> None:
    done = command("push", made, "me/tiny", "--dry-run")
    assert done.code == 0 and "(new, public)" in done.out and "model.safetensors" in done.out
    assert "dry run: nothing was uploaded" in done.out and "names no licence" in done.out
    assert not hub.repos and not hub.asked("^(POST|PUT)")
    told = json.loads(command("push", made, "me/tiny", "--dry-run", "--json").out)
    assert told["uploaded"] is False and told["url"] is None
    assert {file["name"]: file["bytes"] for file in told["files"]}["config.json"] == (
        made / "config.json"
    ).stat().st_size


def test_what_the_hub_holds_is_compared(
    hub: Hub, made: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that keeps other bytes than it was sent is found out."""

    class Forgetful(dict[str, bytes]):
        def __getitem__(self, oid: str) -> bytes:
            return super().__getitem__(oid)[:-1] + b"?"

    hub.objects = Forgetful()
    done = command("push", made, "me/tiny")
    assert done.code == 2 and "model.safetensors has other bytes on http" in done.err


def test_rate_limits(hub: Hub, made: Path, command: Command) -> None:
    hub.fail("^GET /api/models/me/tiny", 429, headers={"Retry-After": "9"})
    done = command("push", made, "me/tiny")
    assert done.code == 2 and done.err.strip().endswith("allows no more requests for now; try again in 9 seconds")


def test_a_refused_write(hub: Hub, made: Path, command: Command) -> None:
    hub.fail("^POST /api/repos/create", 403, message="You have reached your storage limit")
    done = command("push", made, "me/tiny")
    assert done.code == 2 and "may not write to me/tiny (You have reached your storage limit)" in done.err
