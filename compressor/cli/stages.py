"""``compressor prune``, ``quantize``, ``decompose`` and ``linearize``: one stage, its settings as flags."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from compressor.cli.common import Json, Model, Quiet, Revision, TrustRemoteCode, Verbose, run_content, run_options
from compressor.cli.options import given, method_options, with_options
from compressor.cli.run import DryRun, Fresh, Output, Overwrite, carry_out
from compressor.engine.imports import uncollected
from compressor.methods.decompose_settings import DECOMPOSE_METHODS
from compressor.methods.linearize_settings import LINEARIZE_METHODS
from compressor.methods.quantize_settings import QUANTIZE_METHODS
from compressor.methods.settings import PRUNE_METHODS

EMIT_ADAPTER = inspect.Parameter(
    "emit_adapter",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            "--emit-adapter",
            metavar="FOLDER",
            help="Afterwards also write the result as a model without its products, and these as a PEFT adapter in it, "
            "as compressor adapter does. A second folder, beside the output and not described by its recipe; must not "
            "exist yet.",
            rich_help_panel="Output",
            show_default=False,
        ),
    ],
)


def _command(
    kind: str,
    methods: Mapping[str, type[BaseModel]],
    default: str,
    panel: str,
    text: str,
    own: Sequence[inspect.Parameter] = (),
) -> Callable[..., Any]:
    """The command of one kind of stage; every setting of its methods becomes a flag, beside flags of its ``own``."""

    def command(
        model: Model = "embedded",
        output: Output = None,
        dry_run: DryRun = False,
        fresh: Fresh = False,
        overwrite: Overwrite = False,
        trust_remote_code: TrustRemoteCode = False,
        revision: Revision = None,
        verbose: Verbose = 0,
        quiet: Quiet = False,
        as_json: Json = False,
        **values: Any,
    ) -> None:
        with uncollected(for_good=True):
            from compressor.run.recipe import make_recipe

        chosen = given(values, {name for settings in methods.values() for name in settings.model_fields})
        stage = {kind: {"method": values["method"], **chosen}}
        recipe = make_recipe({"stages": [stage], **run_content(values)}, kind)
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
            adapter=values.get("emit_adapter"),
        )

    command.__name__, command.__doc__ = kind, text
    word = typer.Option("--method", "-m", help=f"One of {', '.join(methods)}.", rich_help_panel=panel)
    method = inspect.Parameter(
        "method", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[str, word]
    )
    return with_options(command, [method, *method_options(methods, panel), *run_options(), *own])


prune = _command(
    "prune",
    PRUNE_METHODS,
    "sparsegpt",
    "Pruning",
    """Set weights to zero, and store the rest packed.

    By default half of every matrix by SparseGPT. The result is evaluated on text that was not calibrated on, set beside
    plain rounding of the same size, reloaded in a fresh process, and described by report.html.

    Example: compressor prune embedded -o pruned --sparsity 0.5
    """,
)

quantize = _command(
    "quantize",
    QUANTIZE_METHODS,
    "gptq",
    "Quantization",
    """Store weights in few bits: integers, sums of trit planes, or signs and a few integers.

    By default 4-bit integers by GPTQ, written so that transformers and vLLM load them without compressor. The result is
    evaluated on text that was not calibrated on, set beside plain rounding of the same size, reloaded in a fresh
    process, and described by report.html.

    Example: compressor quantize embedded -o quantized --method trit-planes --planes 2
    """,
)

decompose = _command(
    "decompose",
    DECOMPOSE_METHODS,
    "svd-llm",
    "Decomposition",
    """Replace weight matrices by products of two thin ones, of ranks that the tool chooses.

    By default four fifths of the parameters are kept, where the loss on the calibration text is most sensitive to them.
    The result is evaluated on text that was not calibrated on, set beside plain rounding of the same size, which is
    often the better buy, reloaded in a fresh process, and described by report.html.

    Example: compressor decompose embedded -o decomposed --keep-params 0.8
    """,
    [EMIT_ADAPTER],
)

linearize = _command(
    "linearize",
    LINEARIZE_METHODS,
    "windowed",
    "Linearization",
    """Replace softmax attention by attention with a memory of constant size, and train that to do the same.

    By default a window of exact attention, a few first tokens, and a decaying memory of everything older; a quarter of
    the layers stay softmax, those that matter most. Two million tokens of training. The result is evaluated on text
    that was not trained on, with and without its memory, reloaded in a fresh process, and described by report.html.

    Example: compressor linearize embedded -o linearized --tokens 200000
    """,
)
