"""``compressor prune``: one pruning stage."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compressor.cli.common import Json, Model, Quiet, Revision, TrustRemoteCode, Verbose, run_content, run_options
from compressor.cli.options import given, method_options, with_options
from compressor.cli.run import Fresh, Output, Overwrite, carry_out
from compressor.methods.settings import PRUNE_METHODS


def _prune(
    model: Model = "embedded",
    output: Output = None,
    method: Annotated[
        str, typer.Option("--method", "-m", help=f"One of {', '.join(PRUNE_METHODS)}.", rich_help_panel="Pruning")
    ] = "sparsegpt",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan; same as compressor plan.")] = False,
    fresh: Fresh = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    as_json: Json = False,
    **values: Any,
) -> None:
    """Set weights to zero, and store the rest packed.

    By default half of every matrix by SparseGPT. The result is evaluated on text that was not calibrated on, set beside
    plain rounding of the same size, reloaded in a fresh process, and described by report.html.

    Example: compressor prune embedded -o pruned --sparsity 0.5
    """
    from compressor.run.recipe import make_recipe

    chosen = given(values, {name for cls in PRUNE_METHODS.values() for name in cls.model_fields})
    stage = {"prune": {"method": method, **chosen}}
    recipe = make_recipe({"stages": [stage], **run_content(values)}, "prune")
    carry_out(
        recipe,
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


prune = with_options(_prune, [*method_options(PRUNE_METHODS, "Pruning"), *run_options()])
