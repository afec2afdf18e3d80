"""``compressor run``: a recipe on a model; and what every compressing command does once it has its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli.common import (
    Json,
    Quiet,
    Revision,
    TrustRemoteCode,
    Verbose,
    make_voice,
    print_json,
    typed_command,
)
from compressor.engine.imports import uncollected
from compressor.errors import UserError

if TYPE_CHECKING:
    from compressor.run.recipe import Recipe

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder to write; must not exist yet.", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print the plan; same as compressor plan.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget an interrupted run instead of resuming it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that compressor wrote before.")]


def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a ready one.", metavar="RECIPE")],
    model: Annotated[str, typer.Option("--model", help="Model folder, hub id, or 'embedded'.")] = "embedded",
    output: Output = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Carry out a recipe: a chain of stages, written down in YAML.

    Example: compressor run recipes/sparsegpt-50.yaml --model embedded -o pruned
    """
    with uncollected(for_good=True):
        from compressor.run.recipe import load_recipe

    carry_out(
        load_recipe(recipe),
        model,
        output,
        dry_run=dry_run,
        fresh=fresh,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        revision=revision,
        verbose=verbose,
        quiet=quiet,
        as_json=as_json,
    )


def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a ready one.", metavar="RECIPE")],
    model: Annotated[str, typer.Option("--model", help="Model folder, hub id, or 'embedded'.")] = "embedded",
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show what a recipe would do: layers, bytes, memory, disk, broken rules. Reads no weights."""
    with uncollected(for_good=True):
        from compressor.run.recipe import load_recipe

    show_plan(load_recipe(recipe), model, trust_remote_code, revision, as_json)


def show_plan(recipe: Recipe, model: str, trust_remote_code: bool, revision: str | None, as_json: bool) -> None:
    """Print the plan of a recipe; exit code 2 when it breaks a rule."""
    with uncollected(for_good=True):
        from compressor.cli.show import plan_json, print_plan
        from compressor.run.stream import foresee

    _, foreseen = foresee(recipe, model, trust_remote_code=trust_remote_code, revision=revision)
    if as_json:
        print_json(plan_json(foreseen, model))
    else:
        print_plan(foreseen, model)
    if foreseen.violations:
        raise typer.Exit(2)


def carry_out(
    recipe: Recipe,
    model: str,
    output: Path | None,
    *,
    dry_run: bool,
    fresh: bool,
    overwrite: bool,
    trust_remote_code: bool,
    revision: str | None,
    verbose: int,
    quiet: bool,
    as_json: bool,
    adapter: Path | None = None,
) -> None:
    """Plan or run a recipe, and say what came out.

    Args:
        adapter: folder into which the result is split afterwards, as by ``compressor adapter``.
    """
    if dry_run:
        show_plan(recipe, model, trust_remote_code, revision, as_json)
        return
    if output is None:
        raise UserError("no output folder given", fix="-o FOLDER")
    with uncollected(for_good=True):
        from compressor.cli.show import print_result
        from compressor.engine.processes import rank, world_size
        from compressor.run.adapter import check_split
        from compressor.run.distillation import assist
        from compressor.run.linear_plan import linear_stage
        from compressor.run.stream import Options, compress, foresee

    if adapter is not None:
        _, foreseen = foresee(recipe, model, trust_remote_code=trust_remote_code, revision=revision)
        check_split(foreseen, output, adapter)
    options = Options(
        output=output,
        fresh=fresh,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        revision=revision,
        command=typed_command(),
        own_process=True,
    )
    if world_size() > 1:
        _, foreseen = foresee(recipe, model, trust_remote_code=trust_remote_code, revision=revision)
        if linear_stage(recipe.stages) is None:
            raise UserError("only linearize runs in several processes", fix="start it without accelerate launch")
        if rank() > 0:
            assist(foreseen, model, options)
            return
    voice = make_voice(verbose, quiet)
    try:
        report = compress(recipe, model, options, voice)
    except KeyboardInterrupt:
        raise UserError("interrupted", fix="the same command goes on where it stopped") from None
    if as_json:
        print_json(report.model_dump(mode="json"))
    elif not quiet:
        print_result(report, output)
    if adapter is not None:
        emit(str(output), adapter, trust_remote_code=trust_remote_code, silent=quiet or as_json)


def emit(model: str, folder: Path, *, trust_remote_code: bool = False, silent: bool = False) -> None:
    """Split a model into ``folder`` and an adapter in it, and say so unless ``silent``."""
    from compressor.report.numbers import bytes_text
    from compressor.run.adapter import ADAPTER, split_adapter

    split = split_adapter(model, folder, trust_remote_code=trust_remote_code)
    if not silent:
        typer.echo(f"{split.corrections} low-rank terms ({bytes_text(split.adapter_bytes)}) are in {folder / ADAPTER}")
