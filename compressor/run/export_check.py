"""Loading an export as its reader will, in a fresh process, and comparing what it computes with the packed folder."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.engine.checkpoint import open_checkpoint
from compressor.engine.forward import BlockRunner
from compressor.engine.limits import available_memory
from compressor.engine.skeleton import Skeleton, build_skeleton
from compressor.errors import UserError
from compressor.formats.parts import parse_dtype
from compressor.report.schema_use import Runtime
from compressor.run.container import Container
from compressor.run.loaded import PLAIN_COMMAND, loaded
from compressor.run.plan import PROCESS_BYTES, context_length
from compressor.run.verify import TOLERANCE, ask, start, tolerance

TOKENS = 64
REPORT_IT = "nothing was published; please report this"

IN_MLX = """
import json, sys
import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model
request = json.loads(sys.stdin.read())
model, _ = load_model(__import__("pathlib").Path(request["folder"]))
np.save(request["target"], np.array(model(mx.array(request["ids"])).astype(mx.float32)))
"""


def fits(skeleton: Skeleton) -> bool:
    """Whether a process may load the whole model in fp32."""
    return 2 * skeleton.parameters() * torch.float32.itemsize + PROCESS_BYTES < available_memory()


def check_by_transformers(
    source: Path, folder: Path, form: str, container: Container = "plain", gguf_file: str | None = None
) -> list[Runtime]:
    """Let transformers load ``folder`` in a fresh process, and hold its logits against those of ``source``.

    Args:
        source: the packed folder, whose values the export has.
        form: see `Runtime`.
        container: how the export is stored.
        gguf_file: the file in it to load, where that is no checkpoint.

    Returns:
        What may be said of loading it; nothing where the model does not fit the free memory.

    Raises:
        UserError: it does not load, or computes something else.
    """
    skeleton = build_skeleton(open_checkpoint(source))
    if not fits(skeleton):
        return []
    process = start()  # imports while the logits are computed here
    try:
        ids, logits = _expected(skeleton)
        request = {
            "folder": str(folder.resolve()),
            "ids": ids.tolist(),
            "dtype": "float32",
            "device": "cpu",
            "whole": True,
            "container": container,
            "gguf_file": gguf_file,
            "measured": None,
            "samples": None,
        }
        said, again = ask(process, request, fix=REPORT_IT)
    finally:
        process.kill()
        process.wait()
    difference = float((again - logits).abs().max())
    # a gguf holds the products of codes and scales; a packed layer rounds them to the dtype of the model
    relative = tolerance(torch.float32, skeleton.packed) if gguf_file is None else _rounding(skeleton)
    allowed = relative * float(logits.abs().max())
    if not difference <= allowed:
        raise UserError(
            f"a fresh process computes other logits from the export than the packed folder has (largest difference "
            f"{difference:.3g}, allowed {allowed:.3g})",
            fix=REPORT_IT,
        )
    found = loaded(
        container, whole=True, tokens=ids.numel(), difference=difference, allowed=allowed, reader=said["reader"]
    )
    if gguf_file is not None:
        command = PLAIN_COMMAND.replace('"PATH"', f'"PATH", gguf_file="{gguf_file}"')
        packages = f"transformers {version('transformers')}, gguf {version('gguf')}"
        more = {"name": "transformers + gguf, which unpacks it", "version": packages, "command": command}
        found = [entry.model_copy(update=more) for entry in found]
    return [entry.model_copy(update={"form": form}) for entry in found]


def check_by_mlx(source: Path, folder: Path, command: str) -> list[Runtime]:
    """The same by mlx-lm, where it is installed. MLX computes in the dtype of the model.

    Returns:
        What was found, passed or not: mlx-lm ignores windows of attention, and MLX rounds in half precision.

    Raises:
        UserError: it does not load.
    """
    skeleton = build_skeleton(open_checkpoint(source))
    if find_spec("mlx") is None or find_spec("mlx_lm") is None or not fits(skeleton):
        return []
    import numpy as np

    ids, logits = _expected(skeleton)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "logits.npy"
        request = {"folder": str(folder.resolve()), "ids": ids.tolist(), "target": str(target)}
        done = subprocess.run(
            [sys.executable, "-c", IN_MLX], input=json.dumps(request), capture_output=True, text=True, check=False
        )
        if done.returncode:
            problem = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise UserError(f"mlx-lm could not load the export: {problem}", fix=REPORT_IT)
        again = torch.from_numpy(np.load(target))
    difference = float((again - logits).abs().max())
    allowed = _rounding(skeleton) * float(logits.abs().max())
    return [
        Runtime(
            name="mlx-lm",
            version=f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}",
            form="mlx",
            command=command,
            language="shell",
            check=f"logits of {ids.numel()} tokens in a fresh process",
            difference=difference,
            allowed=allowed,
            passed=difference <= allowed,
        )
    ]


def _rounding(skeleton: Skeleton) -> float:
    """What may differ, relative to the largest logit, where one side rounds matrices to the dtype of the model."""
    return max(
        TOLERANCE[dtype] for dtype in {torch.float32, *(parse_dtype(s["dtype"]) for s in skeleton.packed.values())}
    )


@torch.no_grad()
def _expected(skeleton: Skeleton) -> tuple[Tensor, Tensor]:
    """Token ids (1, T), and the logits (1, T, vocabulary) fp32 of the packed model, one block in memory at a time."""
    length = min(TOKENS, context_length(skeleton.config) or TOKENS)
    ids: Any = (torch.arange(length)[None] * 7919) % int(skeleton.config.get_text_config().vocab_size)
    runner = BlockRunner(skeleton, device=torch.device("cpu"), dtype=torch.float32)
    runner.load_outer()
    stream = runner.start(ids)
    runner.run(stream)
    return ids, runner.logits(stream, slice(0, 1))
