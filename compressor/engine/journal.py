"""What a run has finished, so that the same command can go on after a crash and end with the same bytes.

Order of events for a block: its shard is written and renamed, the hidden states behind it are written and renamed, then
the journal names both. A kill between any two of these leaves the journal at the previous block, whose files still
exist.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.engine.tensorfile import layout_of, read_header, read_tensor, write_file
from compressor.errors import UserError

JOURNAL = "journal.json"


@dataclass
class Journal:
    """The journal of one working folder.

    Attributes:
        fingerprint: everything that decides the bytes of the output, by name.
        facts: what was learnt before the first block (surveys, warnings), by name.
        blocks: one record for each finished block, in order.
        interruptions: how often the run was taken up again.
    """

    folder: Path
    fingerprint: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    interruptions: int = 0

    def write(self) -> None:
        """Replace the journal on disk in one step."""
        content = {
            "fingerprint": self.fingerprint,
            "facts": self.facts,
            "blocks": self.blocks,
            "interruptions": self.interruptions,
        }
        write_atomically(self.folder / JOURNAL, json.dumps(content))

    def states_file(self, finished: int) -> Path:
        """Where the hidden states behind ``finished`` blocks lie."""
        return self.folder / f"states-{finished:05d}.safetensors"

    def save_states(self, finished: int, states: dict[str, Tensor]) -> None:
        """Write the hidden states behind ``finished`` blocks."""
        write_file(self.states_file(finished), layout_of(states.items()), states.__getitem__)

    def load_states(self) -> dict[str, Tensor]:
        """Read the hidden states behind the last finished block."""
        return {name: read_tensor(entry) for name, entry in read_header(self.states_file(len(self.blocks))).items()}

    def finish_block(self, record: dict[str, Any], states: dict[str, Tensor]) -> None:
        """Record a block whose shard has been written."""
        self.finish_blocks([record], states)

    def finish_blocks(self, records: Sequence[dict[str, Any]], states: dict[str, Tensor]) -> None:
        """Record the next blocks, whose files have been written; ``states`` are those behind the last of them."""
        before = self.states_file(len(self.blocks))
        self.save_states(len(self.blocks) + len(records), states)
        self.blocks.extend(records)
        self.write()
        before.unlink(missing_ok=True)


def open_journal(folder: Path, fingerprint: dict[str, Any]) -> Journal:
    """Take up the journal of a working folder, or begin one.

    Raises:
        UserError: the folder belongs to a run with another recipe or input; names what changed, and ``--fresh``.
    """
    path = folder / JOURNAL
    if not path.exists():
        journal = Journal(folder, fingerprint)
        journal.write()
        return journal
    try:
        content = json.loads(path.read_text())
        known = content["fingerprint"]
        journal = Journal(folder, known, content["facts"], content["blocks"], content["interruptions"] + 1)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged", fix="--fresh starts over") from error
    changed = sorted(_changes(known, json.loads(json.dumps(fingerprint))))
    if changed:
        raise UserError(
            f"{folder.name} holds an interrupted run that differs: {'; '.join(changed)}",
            fix="--fresh starts over, the old settings go on",
        )
    journal.write()
    return journal


def read_journal(folder: Path) -> Journal:
    """The journal that another process holds open, as it is now."""
    content = json.loads((folder / JOURNAL).read_text())
    return Journal(folder, content["fingerprint"], content["facts"], content["blocks"], content["interruptions"])


def _changes(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from _changes(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _changes(before, after, f"{path}.{number}")
    elif old != new:
        yield f"{path} was {_short(old)}, is {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:18] + "..." + text[-18:]


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is either the old one or the new one, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a working folder alone: two runs into one output would tear each other's files.

    Raises:
        UserError: another live process holds it.
    """
    lock = folder / "lock"
    with lock.open("a+") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # no advisory locks on this system
        except OSError:
            raise UserError(
                f"{folder} is in use by another run", fix="wait for it or choose another --output"
            ) from None
        yield
    with suppress(OSError):
        lock.unlink()
