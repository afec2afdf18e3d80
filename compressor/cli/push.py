"""``compressor push``: a finished folder to a hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from compressor.cli.common import Json, Quiet, print_json
from compressor.cli.tables import add_row, new_table, printable, say, wide_console

if TYPE_CHECKING:
    from compressor.run.push import Prepared, Pushed


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that compressor has written.", metavar="OUT")],
    name: Annotated[str, typer.Argument(help="Where to: namespace/name.", metavar="NAMESPACE/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch to upload to (made if need be), or refs/pr/N.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Propose it as a pull request instead of writing to the main branch.")
    ] = False,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="URL of the hub (default: HF_ENDPOINT, or huggingface.co).")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what compressor has uploaded there before.")
    ] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Message of the commit.")] = None,
    paths: Annotated[
        Literal["refuse", "shorten", "allow"],
        typer.Option("--paths", help="Absolute paths in texts: refuse them, upload file names only, or allow them."),
    ] = "refuse",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and list the files; write nothing to the hub.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Upload a folder to the Hugging Face hub, or another that speaks its API, and compare what is there then.

    The token comes from HF_TOKEN or `hf auth login`, never from the command line.
    An interrupted upload goes on when the same command is given again.

    Example: compressor push pruned me/tiny-pruned --private
    """
    from compressor.errors import UserError
    from compressor.run.push import Wanted, prepare
    from compressor.run.push import push as upload

    wanted = Wanted(
        private=private,
        revision=revision,
        create_pr=create_pr,
        endpoint=endpoint,
        overwrite=overwrite,
        paths=paths,
        message=message,
    )
    if quiet or as_json:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    try:
        prepared = prepare(folder, name, wanted)
        if not quiet and not as_json:
            show_files(prepared, wanted.private)
        pushed = None if dry_run else upload(prepared, wanted)
    except KeyboardInterrupt:
        raise UserError("interrupted", fix="the same command goes on where it stopped") from None
    if as_json:
        print_json(push_json(prepared, pushed))
    elif not quiet:
        show_end(prepared, pushed)


def show_files(prepared: Prepared, private: bool) -> None:
    """What goes where."""
    from compressor.report.numbers import bytes_text

    console = wide_console()
    kind = f"new, {'private' if private else 'public'}" if prepared.new else "there already"
    table = new_table(printable(f"{prepared.model} on {prepared.endpoint} ({kind})"), ("file",), ("size",))
    for piece in prepared.pieces:
        add_row(table, piece.name, bytes_text(piece.size))
    console.print(table)
    for name in prepared.stale:
        say(console, f"  {name}: only on the hub, is removed")
    total = bytes_text(sum(piece.size for piece in prepared.pieces))
    say(console, f"{len(prepared.pieces)} files, {total}; no secrets, no paths, complete")
    for doubt in prepared.doubts:
        say(console, f"note: {doubt}")


def show_end(prepared: Prepared, pushed: Pushed | None) -> None:
    """What became of it, and how to load it."""
    from compressor.engine.hub_names import HUGGING_FACE
    from compressor.run.push import load_command

    console = wide_console()
    if pushed is None:
        already = "the hub holds all of it already" if prepared.done else "nothing was uploaded"
        say(console, f"dry run: {already}")
        return
    done = "uploaded" if pushed.uploaded else "nothing to upload"
    say(console, f"{done}; the hub holds these {len(prepared.pieces)} files, compared by their hashes")
    to_copy = [pushed.url]
    command = load_command(prepared)
    if command is not None and not pushed.proposed:
        elsewhere = prepared.endpoint != HUGGING_FACE
        to_copy += ["", *([f"# with HF_ENDPOINT={prepared.endpoint}"] if elsewhere else []), *command.splitlines()]
    for line in to_copy:
        console.print(printable(line), soft_wrap=True)  # in one piece


def push_json(prepared: Prepared, pushed: Pushed | None) -> dict[str, object]:
    """The same for machines."""
    return {
        "model": prepared.model.id,
        "revision": prepared.model.revision,
        "endpoint": prepared.endpoint,
        "files": [
            {"name": piece.name, "bytes": piece.size, "sha256": prepared.sums.get(piece.name)}
            for piece in prepared.pieces
        ],
        "removed": list(prepared.stale),
        "notes": prepared.doubts,
        "url": None if pushed is None else pushed.url,
        "commit": None if pushed is None else pushed.commit,
        "uploaded": pushed is not None and pushed.uploaded,
    }
