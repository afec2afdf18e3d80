"""Commands of the documentation made small, and the folders that they take for granted."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from command_line import Command

from compressor.run.recipe import load_recipe

SMALL = {
    "--nsamples": "8",
    "--seqlen": "64",
    "--eval-windows": "2",
    "--eval-seqlen": "64",
    "--windows": "2",
    "--tune-steps": "2",
    "--qat-steps": "2",
    "--preprocess": "2",
    "--context": "0,8",
    "--steps": "2",
    "--correct": "2",
}
"""Flag -> its value here, whatever a page says."""

LINEAR = {"--tokens": "1024", "--seqlen": "160", "--nsamples": "16"}
"""The same for ``linearize``, whose windows have to be longer than those of its attention."""

LONGER = {"--long-tokens": "1024", "--long-seqlen": "256"}
"""Its third stage, where a page asks for one."""

QUICK = {"--nsamples": "8", "--seqlen": "64", "--eval": "none", "--no-verify": None}
"""Added to whatever compresses, unless a page has the flag: few windows, nothing evaluated, no fresh process."""

ADDED: dict[str, dict[str, str | None]] = {
    "prune": QUICK,
    "quantize": {**QUICK, "--include": "q_proj"},
    "decompose": QUICK,
    "linearize": {**QUICK, **LINEAR, "--select-tokens": "256", "--batch": "4"},
    "bench": {"--tokens": "2", "--context": "0,8"},
    "evaluate": {"--windows": "2", "--seqlen": "64"},
    "generate": {"--tokens": "4"},
}
"""Verb -> flags that make it cheap. `linearize` trains on no budget but ``--tokens``."""

ALL_OF_IT = "q"
"""The output of ``quantize`` whose layers are all rounded, since what reads it next takes nothing less."""

MODEL = "embedded"
FILES = {
    "my.txt": "Once upon a time there was a fox. It went into the wood, and there it met a hare.\n" * 200,
    "questions.jsonl": '{"query": "Question: What is 1 + 1?", "choices": ["2", "7"], "gold": 0}\n' * 4,
    "my.jsonl": '{"text": "Once upon a time there was a fox, and it met a hare in the wood."}\n' * 400,
    "other.jsonl": '{"text": "The old tower stood by the sea, and nobody had lived in it for years."}\n' * 400,
}
"""Texts that pages name."""

MADE = {
    "pruned": "prune embedded --sparsity 0.5 --nsamples 8 --seqlen 64 --eval-windows 2 --no-verify",
    "quantized": "quantize embedded --nsamples 8 --seqlen 64 --eval-windows 2 --no-verify",
    "trits": "quantize embedded -m trit-planes --include q_proj --nsamples 8 --seqlen 64 --eval-windows 2 --no-verify",
    "corrected": "quantize embedded --correct 2 --nsamples 8 --seqlen 64 --eval none --no-verify",
    "decomposed": "decompose embedded --nsamples 8 --seqlen 64 --rounds 1 --eval none --no-verify",
    "plain": "prune embedded --save dense --nsamples 8 --seqlen 64 --eval none --no-verify",
}
"""Folder that pages name -> what has made it."""


class Standing:
    """The folders of `MADE`, made when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done: dict[tuple[str, ...], Path] = {}

    def put(self, words: list[str], folder: Path, command: Command) -> None:
        """Put whatever ``words`` name, and is not there yet, into ``folder``."""
        named = {part for word in words for part in re.split(r"[/:@]", word)}
        for name in named & FILES.keys():
            (folder / name).write_text(FILES[name], encoding="utf-8")
        for name in named & MADE.keys():
            target = self.root / name
            if not target.exists():
                verb, *rest = MADE[name].split()
                result = command(verb, *rest, "-o", target)
                assert result.code == 0, result.err
            if not (folder / name).exists():
                (folder / name).symlink_to(target)

    def same(self, words: list[str], output: str | None) -> Path | None:
        """What the same command has written for another page, where only the embedded model went in."""
        found = self.done.get(signature(words, output))
        return found if found is not None and found.exists() else None

    def remember(self, words: list[str], output: str | None, folder: Path) -> None:
        """Keep what a command has written, for pages that have it again."""
        if words[:2] and words[1:2] == [MODEL] and output is not None and "--emit-adapter" not in words:
            self.done[signature(words, output)] = folder / output

    def make_way(self, path: Path) -> None:
        """Take an earlier output away from a name that is written anew; it may be asked for again."""
        if path.is_symlink():
            path.unlink()
            return
        kept = self.root / f"earlier-{len(list(self.root.iterdir()))}"
        path.rename(kept)
        self.done = {words: kept if target == path else target for words, target in self.done.items()}


def signature(words: list[str], output: str | None) -> tuple[str, ...]:
    """A command without the name of its output."""
    return tuple(word for word in words if word != output)


def small(words: list[str], folder: Path) -> list[str]:
    """The same command, made cheap."""
    verb, given = words[0], [MODEL if word == "MODEL" else word for word in words]
    if verb == "linearize":
        given = without(given, "--budget")
    table = {**SMALL, **(LINEAR | LONGER if verb == "linearize" else {})}
    out: list[str] = []
    for at, word in enumerate(given):
        before = given[at - 1] if at else ""
        out.append(table.get(before, word) if not word.startswith("--") else word)
    whole = {"transact", "--target-size", "--joint"} & set(out)  # what is settled for all matrices of a block together
    added = {**ADDED.get(verb, {}), **({"--include": "v_proj"} if verb == "decompose" and not whole else {})}
    if output_of(out) == ALL_OF_IT:
        added.pop("--include", None)
    if "flexround" in out:
        added["--tune-steps"] = "2"  # learns without being asked to
    for flag, value in added.items():
        if flag not in out:
            out += [flag] if value is None else [flag, value]
    if verb == "run":
        out[1] = str(small_recipe(out[1], folder))
    return out


def without(words: list[str], flag: str) -> list[str]:
    """The words without a flag and its value."""
    return words if flag not in words else [*words[: words.index(flag)], *words[words.index(flag) + 2 :]]


def small_recipe(name: str, folder: Path) -> Path:
    """A recipe with few windows, little learning and nothing evaluated."""
    content = load_recipe(name).resolved()
    content["calibration"] |= {"nsamples": 8, "seqlen": 64}
    content["evaluation"] |= {"texts": ["none"]}
    content["verify"] = False
    for stage in content["stages"]:
        for settings in stage.values():
            if settings.get("tune_steps"):
                settings["tune_steps"] = 2
            if "budget" in settings:
                settings |= {"tokens": 1024, "select_tokens": 256}
                content["calibration"] |= {"nsamples": 16, "seqlen": 160}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def output_of(words: list[str]) -> str | None:
    """The folder that a command writes."""
    for flag in ("-o", "--output"):
        if flag in words:
            return words[words.index(flag) + 1]
    if words[0] != "export" or len(words) < 3:
        return None
    return f"{words[1]}-{words[words.index('--format') + 1]}" if words[2].startswith("-") else words[2]
