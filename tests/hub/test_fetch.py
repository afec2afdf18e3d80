"""Models by hub id: revisions, and one clear line for whatever goes wrong."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from command_line import Command
from loopback import Hub

from compressor.calibration.hub import stream_rows
from compressor.calibration.spec import named_set
from compressor.engine.checkpoint import resolve_model
from compressor.engine.hub import CHECKSUMS, find_cached
from compressor.engine.hub_errors import hub_error
from compressor.engine.hub_names import HubName, commit_of, parse_name, shown_name
from compressor.errors import UserError

Files = dict[str, bytes]


def refusal(name: str, **more: str) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(UserError) as caught:
        resolve_model(name, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("org/name", None, HubName("org/name")),
        ("org/name@v1", None, HubName("org/name", "v1")),
        ("org/name@refs/pr/1", None, HubName("org/name", "refs/pr/1")),
        ("org/name", "v1", HubName("org/name", "v1")),
        ("org/name@v1", "v1", HubName("org/name", "v1")),
        ("name", None, None),
        ("./org/name", None, None),
        ("/org/name", None, None),
        ("a/b/c", None, None),
        ("..", None, None),
    ],
)
def test_names(name: str, revision: str | None, expected: HubName | None) -> None:
    assert parse_name(name, revision) == expected


def test_two_revisions_are_refused() -> None:
    assert "name two revisions" in refusal("org/name@v1", revision="v2")
    assert "names no revision" in refusal("org/name@")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    assert "local folder" in refusal(str(tmp_path), revision="main")
    assert "local folder" in refusal("embedded", revision="main")


def test_a_folder_with_an_at_in_its_name_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name@v1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name@v1") == tmp_path / "org" / "name@v1"


def test_branches_and_commits(hub: Hub, embedded_files: Files) -> None:
    first = hub.put("org/tiny", embedded_files)
    second = hub.repos["org/tiny"].commit("next", embedded_files | {"NOTICE": b"second"})
    old, new = resolve_model("org/tiny"), resolve_model("org/tiny@next")
    assert (commit_of(old), commit_of(new)) == (first, second)
    assert resolve_model(f"org/tiny@{first}") == old
    assert (new / "NOTICE").read_text() == "second" and not (old / "NOTICE").exists()
    assert (old / "model.safetensors").read_bytes() == embedded_files["model.safetensors"]
    assert shown_name(old) == "org/tiny"
    assert len(hub.asked("^GET .*/model.safetensors")) == 1, "one content is fetched once"
    assert find_cached(HubName("org/tiny", second)) == new
    assert find_cached(HubName("org/other")) is None


@pytest.mark.parametrize(
    ("token", "name", "words"),
    [
        ("hf_me", "org/none", "has no model 'org/none', or it is private"),
        ("hf_me", "org/tiny@nope", "org/tiny has no revision 'nope'"),
        ("hf_me", "org/gated", "org/gated is gated: its authors want its terms accepted first; accept them at http"),
        ("hf_you", "me/secret", "set HF_TOKEN"),
        ("hf_wrong", "org/tiny", "does not accept the token"),
        ("hf_me", "org/bins", "holds no *.safetensors files"),
        ("hf_me", "org/ti--ny", "is no name that a hub allows"),
    ],
)
def test_what_the_hub_refuses(
    token: str, name: str, words: str, hub: Hub, embedded_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.put("org/tiny", embedded_files)
    hub.put("org/gated", embedded_files, gated=True)
    hub.put("me/secret", embedded_files, private=True)
    hub.put("org/bins", {"config.json": b"{}", "pytorch_model.bin": b"PK"})
    assert words in refusal(name)


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (429, {"Retry-After": "7"}, "allows no more requests for now; try again in 7 seconds"),
        (429, {"ratelimit": '"api";r=0;t=55'}, "try again in 55 seconds"),
        (429, {}, "try again later"),
        (500, {}, "has a problem of its own (status 500)"),
        (503, {}, "has a problem of its own (status 503)"),
        (403, {}, "the token may not read org/tiny"),
    ],
)
def test_statuses(status: int, headers: dict[str, str], words: str, hub: Hub, embedded_files: Files) -> None:
    hub.put("org/tiny", embedded_files)
    hub.fail("GET /api/models/org/tiny", status, headers=headers)
    assert words in refusal("org/tiny")
    assert resolve_model("org/tiny").is_dir(), "and afterwards it works"


def test_no_network(hub: Hub, embedded_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.put("org/tiny", embedded_files)
    cached = resolve_model("org/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve_model("org/tiny") == cached, "what was fetched before needs no network"
    assert "cannot reach http://127.0.0.1:9" in refusal("org/none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("org/tiny") == cached
    assert "HF_HUB_OFFLINE" in refusal("org/none")


def test_a_download_that_breaks_off_goes_on(hub: Hub, embedded_files: Files) -> None:
    hub.put("org/tiny", embedded_files)
    hub.fail("GET .*/model.safetensors", "cut", after=300_000)
    folder = resolve_model("org/tiny")
    assert (folder / "model.safetensors").read_bytes() == embedded_files["model.safetensors"]


def test_a_wrong_checksum(hub: Hub, embedded_files: Files) -> None:
    hub.put("org/tiny", embedded_files)
    hub.fail("GET .*/model.safetensors", "corrupt")
    assert "model.safetensors of org/tiny does not have the checksum" in refusal("org/tiny")
    folder = resolve_model("org/tiny")
    assert (folder / "model.safetensors").read_bytes() == embedded_files["model.safetensors"], "fetched anew"


def test_the_models_own_checksums(hub: Hub, embedded_files: Files) -> None:
    listed = f"{'0' * 64}  model.safetensors\n".encode()
    hub.put("org/tiny", embedded_files | {CHECKSUMS: listed})
    assert "does not have the checksum" in refusal("org/tiny")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: org/tiny does not fit"),
        (httpx2.ReadTimeout("slow"), "did not answer in time"),
        (httpx2.RemoteProtocolError("gone"), "broke off"),
        (OSError("Consistency check failed: file should be of size 3 but has size 2"), "broke off"),
        (ValueError("what?\nmore"), "did something unexpected with org/tiny: ValueError: what?"),
    ],
)
def test_what_never_reaches_the_hub(error: Exception, words: str) -> None:
    wrapped = RuntimeError("Error while downloading")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        said = str(hub_error(each, HubName("org/tiny")))
        assert words in said and "\n" not in said


def test_a_full_disk_in_the_middle(hub: Hub, embedded_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import file_download

    real, full = file_download.http_get, [True]

    def http_get(url: str, *arguments: object, **more: object) -> None:
        if "safetensors" in url and full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(url, *arguments, **more)  # type: ignore[arg-type]

    hub.put("org/tiny", embedded_files)
    monkeypatch.setattr(file_download, "http_get", http_get)
    assert "the disk is full" in refusal("org/tiny")
    full.clear()
    assert resolve_model("org/tiny").is_dir()


def test_verbs_take_hub_ids(hub: Hub, embedded_files: Files, command: Command, made: Path, tmp_path: Path) -> None:
    hub.put("org/tiny", embedded_files)
    hub.put("org/pruned", {file.name: file.read_bytes() for file in made.iterdir()})
    shown = command("explain", "org/tiny@main")
    assert shown.code == 0 and shown.out.startswith("org/tiny: LlamaForCausalLM"), shown.err
    compared = command("compare", "org/tiny", "org/pruned@main")
    assert compared.code == 0 and "org/pruned@main" in compared.out, compared.err
    said = command("generate", "org/pruned@main", "--prompt", "The", "--tokens", "2")
    assert said.code == 0 and said.out.startswith("The"), said.err
    exported = command("export", "org/pruned", tmp_path / "plain")
    assert exported.code == 0 and (tmp_path / "plain" / "model.safetensors").is_file(), exported.err
    refused = command("explain", "org/tiny@nope")
    assert refused.code == 2 and refused.err.startswith("error: org/tiny has no revision 'nope'")


def test_a_run_on_a_hub_id_says_where_it_came_from(
    hub: Hub, embedded_files: Files, command: Command, tmp_path: Path, token: Callable[[str], None]
) -> None:
    from compressor.report.card_front import front_matter_of
    from compressor.report.files import read_report

    card = b"---\nlicense: apache-2.0\nextra_gated_prompt: Be kind.\n---\n"
    commit = hub.put("org/tiny", embedded_files | {"README.md": card})
    flags = ("--method", "magnitude", "--sparsity", "0.5", "--eval", "none", "--no-verify", "-q")
    first = command("prune", "org/tiny@main", *flags, "-o", tmp_path / "once")
    assert first.code == 0, first.err
    report = read_report(tmp_path / "once")
    assert (report.model.source, report.model.revision) == ("org/tiny", commit)
    front = front_matter_of((tmp_path / "once" / "README.md").read_text())
    assert (front["base_model"], front["license"], front["extra_gated_prompt"]) == (
        "org/tiny",
        "apache-2.0",
        "Be kind.",
    )
    second = command("quantize", tmp_path / "once", "--method", "rtn", *flags[4:], "-o", tmp_path / "twice")
    assert second.code == 0, second.err
    front = front_matter_of((tmp_path / "twice" / "README.md").read_text())
    assert (front["base_model"], front["base_model_relation"]) == ("org/tiny", "quantized"), "handed on in a chain"
    assert "pruned" in front["tags"] and front["extra_gated_prompt"] == "Be kind."


def test_a_log_says_what_is_fetched(hub: Hub, embedded_files: Files, command: Command) -> None:
    """Once, before it comes; nothing where the cache has it, or nobody wants to know."""
    hub.put("org/tiny", embedded_files | {"weights.bin": bytes(10_000_000)})
    hub.repos["org/tiny"].commit("v2", embedded_files | {"NOTICE": b"second"})
    size = sum(map(len, embedded_files.values())) / 1e6
    line = f"fetching org/tiny@main: {len(embedded_files)} files, {size:.3g} MB\n"
    assert command("explain", "org/tiny").err == line
    assert command("explain", "org/tiny").err == ""
    assert command("explain", "org/tiny@v2").err == "fetching org/tiny@v2: 1 file, 0.006 kB\n"
    hub.put("org/other", embedded_files)
    fetched = command("prune", "org/other", "-q", "--dry-run")
    assert fetched.code == 0 and fetched.err == "" and len(hub.asked("GET .*org/other.*blobs")) == 0
    hub.put("org/third", embedded_files)
    hub.fail("GET /api/models/org/third", 500)
    result = command("explain", "org/third")
    assert result.code == 0 and result.err == "", "not known, and none the worse"


def test_sets_say_where_they_come_from(
    hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"text": "a"}]))
    with caplog.at_level("INFO", "compressor.hub"):
        rows = list(stream_rows(named_set("gsm8k")))
    commit = "cc7b047b6e5bb11b4f1af84efc572db110a51b3c"
    assert rows == [{"text": "a"}]
    assert caplog.messages == [f"reading gsm8k from the hub: openai/gsm8k@{commit}, as far as it is needed"]
