"""What a run may say about loading its result: only what its verification really did."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from compressor.report.schema_use import Runtime
from compressor.run.container import Container

PLAIN_COMMAND = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")"""
OWN_COMMAND = f"import compressor  # makes the model type known to transformers\n{PLAIN_COMMAND}"
READER_COMMAND = PLAIN_COMMAND.replace('LM.from_pretrained("PATH"', 'LM.from_pretrained("PATH", trust_remote_code=True')

ROUTES: dict[Container, tuple[str, tuple[str, ...], str, str]] = {
    "plain": ("transformers", ("transformers",), "dense", PLAIN_COMMAND),
    "compressed-tensors": (
        "transformers + compressed-tensors",
        ("transformers", "compressed-tensors"),
        "packed integers",
        PLAIN_COMMAND,
    ),
    "compressor": ("transformers + compressor", ("transformers", "compressor"), "packed", OWN_COMMAND),
}
"""Container -> name of the runtime, its packages, what it loads, and how."""

READER = "transformers, trust_remote_code=True"
"""Name of the runtime that reads a packed folder by the reader file in it."""


def loaded(
    container: Container, *, whole: bool, tokens: int, difference: float, allowed: float, reader: dict[str, Any] | None
) -> list[Runtime]:
    """The runtimes in which a fresh process has loaded the folder.

    Args:
        whole: whether it loaded the model by the command at all, and not block by block.
        tokens: compared in each.
        difference, allowed: largest difference of a logit, and the one that passes.
        reader: the same ``difference`` by the reader file, or the ``problem`` there; None where it was not tried.
    """
    if not whole:
        return []
    check = f"logits of {tokens} tokens in a fresh process"
    name, packages, form, command = ROUTES[container]
    shared: dict[str, Any] = {"form": form, "allowed": allowed}
    found = [
        Runtime(
            name=name,
            version=_versions(*packages),
            command=command,
            check=check,
            difference=difference,
            passed=True,
            **shared,
        )
    ]
    if reader is not None:
        problem, value = reader.get("problem"), reader.get("difference")
        found.append(
            Runtime(
                name=READER,
                version=_versions("transformers"),
                command=READER_COMMAND,
                check=f"{check}, by the reader file alone" if problem is None else f"{check}: {problem}",
                difference=value,
                passed=value is not None and value <= allowed,
                **shared,
            )
        )
    return found


def doubts(runtimes: Sequence[Runtime]) -> list[str]:
    """What a report warns of: ways to load that did not work."""
    return [
        f"not loaded by {entry.name}: {entry.check}"
        + ("" if entry.difference is None else f" (largest difference {entry.difference:.3g})")
        for entry in runtimes
        if not entry.passed
    ]


def _versions(*names: str) -> str:
    from compressor import __version__

    found = {name: __version__ if name == "compressor" else version(name) for name in names}
    if len(names) == 1:
        return found[names[0]]
    return ", ".join(f"{name} {number}" for name, number in found.items())
