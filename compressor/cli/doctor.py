"""``compressor doctor``: what is installed, what this machine has, and what is wrong with it."""

from __future__ import annotations

import typer

from compressor.cli.common import Json, print_json
from compressor.cli.tables import print_facts, wide_console


def doctor(as_json: Json = False) -> None:
    """Show versions, devices, kernels for packed models, disk space and the hub; exit code 1 where something is wrong.

    Asks the hub one question, and waits 3 seconds for the answer; HF_HUB_OFFLINE=1 keeps it off the network.
    """
    from compressor.run.doctor import examine

    facts = examine()
    if as_json:
        print_json([{"name": fact.name, "value": fact.value, "wrong": fact.wrong} for fact in facts])
    else:
        print_facts(wide_console(), {fact.name: f"{'WRONG: ' if fact.wrong else ''}{fact.value}" for fact in facts})
    if any(fact.wrong for fact in facts):
        raise typer.Exit(1)
