"""A fresh process loads the written folder and must reproduce the logits of the run.

The process is started while the last blocks are still being worked on, so that its imports cost no time; it waits for
the folder on its standard input: one JSON request on stdin, one answer on stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.engine.imports import end_quickly, uncollected
from compressor.engine.limits import available_memory
from compressor.errors import UserError
from compressor.formats.parts import Spec, parse_dtype
from compressor.formats.registry import format_of
from compressor.hf.autoload import forget
from compressor.kernels.native import using
from compressor.report.schema import KernelCost, Verification
from compressor.report.schema_use import Runtime
from compressor.run.container import Container
from compressor.run.kernel_cost import chosen_windows, kernel_cost
from compressor.run.loaded import loaded
from compressor.run.measure import Texts
from compressor.run.plan import PROCESS_BYTES, Plan
from compressor.run.progress import without_bars
from compressor.run.recipe import Recipe
from compressor.run.samples import Asked, continuations

# Largest difference of a logit allowed, relative to the largest logit: another order of sums, nothing more.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}

ROUTES: dict[Container, str] = {
    "plain": "stock transformers",
    "compressed-tensors": "stock transformers with compressed-tensors",
    "compressor": "import compressor",
}


def tolerance(dtype: torch.dtype, specs: Mapping[str, Spec]) -> float:
    """Return the difference allowed between two ways to compute in ``dtype``.

    Args:
        specs: module path -> manifest entry. Where a layer multiplies by its parts one after the other, the matrix is
            never rounded to the dtype of the model, as it is in a run; so differences of that dtype are allowed.
    """
    rounded = {parse_dtype(spec["dtype"]) for spec in specs.values() if format_of(spec).apply is not None}
    return max(TOLERANCE[each] for each in {dtype, *rounded})


START = """
from compressor.engine.imports import uncollected
with uncollected():
    from compressor.run.verify import serve
serve()
"""


@dataclass(frozen=True)
class Checked:
    """What the process found; ``said`` as from :func:`compressor.run.samples.continuations`, None where not asked."""

    verification: Verification
    said: dict[str, Any] | None


def start() -> subprocess.Popen[str]:
    """Start the process, which waits for its request."""
    pipe = subprocess.PIPE  # standard error, too: it is the user's
    return subprocess.Popen([sys.executable, "-c", START], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def ask(process: subprocess.Popen[str], request: Mapping[str, Any], *, fix: str) -> tuple[dict[str, Any], Tensor]:
    """Give the process its request, see `recompute`; it ends with the answer.

    Returns:
        What it said, and the logits (1, T, vocabulary) fp32.

    Raises:
        UserError: the folder does not load; with ``fix``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "logits.pt"
        answer, complaints = process.communicate(json.dumps({**request, "target": str(target)}) + "\n")
        lines = answer.strip().splitlines()
        ended = {"problem": " ".join([f"it ended with {process.returncode}", *complaints.strip().splitlines()[-1:]])}
        said: dict[str, Any] = json.loads(lines[-1]) if lines else ended
        if said["problem"] is not None:
            raise UserError(f"a fresh process could not load the written model: {said['problem']}", fix=fix)
        return said, torch.load(target, weights_only=True)


class Verifier:
    """Holds the waiting process.

    Attributes:
        runtimes: in which the folder was loaded, once it was checked.
    """

    def __init__(self, recipe: Recipe, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan
        self.runtimes: list[Runtime] = []
        self.route = ROUTES[plan.container]
        self.process = start()

    def check(self, ids: Tensor, logits: Tensor, texts: Texts | None = None, asked: Asked | None = None) -> Checked:
        """Ask for the logits of ``ids`` (1, T) and compare them with ``logits`` (1, T, vocabulary) fp32.

        The process multiplies exactly; then it lets the models go on with what is ``asked``, and measures on the
        first of ``texts`` what the kernels cost.

        Raises:
            UserError: the folder does not load, or does something else; it is not published.
        """
        since = time.perf_counter()
        dense = self.plan.skeleton.parameters() * self.plan.dtype.itemsize
        whole = 2 * dense + PROCESS_BYTES < available_memory()
        both = 3 * dense + PROCESS_BYTES < available_memory()
        windows, skipped = self._to_measure(texts, whole)
        request = {
            "folder": str(self.folder.resolve()),
            "ids": ids.tolist(),
            "dtype": str(self.plan.dtype).removeprefix("torch."),
            "device": str(self.plan.device),
            "whole": whole,
            "container": self.plan.container,
            "measured": None if windows is None else windows.tolist(),
            "samples": asked.request() if asked is not None and asked.prompts is not None and both else None,
        }
        said, again = ask(self.process, request, fix=f"the unfinished result is in {self.folder}; please report this")
        difference = float((again - logits.cpu()).abs().max())
        allowed = tolerance(self.plan.dtype, self.plan.specs) * float(logits.abs().max())
        if not difference <= allowed:
            raise UserError(
                f"a fresh process computes other logits from the written model (largest difference {difference:.3g}, "
                f"allowed {allowed:.3g})",
                fix=f"the unfinished result is in {self.folder}; please report this",
            )
        kernels = None
        if texts is not None and (facts := said["kernels"]) is not None:
            kernels = KernelCost(text=texts.texts[0].name, **facts) if "rung" in facts else None
            skipped = facts.get("skipped")
        spent = said["seconds"] + (kernels.seconds if kernels is not None else 0.0)
        self.runtimes = loaded(
            self.plan.container,
            whole=whole,
            tokens=ids.numel(),
            difference=difference,
            allowed=allowed,
            reader=said["reader"],
        )
        verification = Verification(
            passed=True,
            mode="whole model" if whole else "block by block",
            route=self.route,
            max_abs_difference=difference,
            tokens=ids.numel(),
            seconds=time.perf_counter() - since - spent,
            kernels=kernels,
            kernels_skipped=skipped,
        )
        small = {"skipped": "source and result together do not fit the free memory"}
        return Checked(verification, said["samples"] if both else small)

    def _to_measure(self, texts: Texts | None, whole: bool) -> tuple[Tensor | None, str | None]:
        """The windows on which the kernels' cost is measured, or why it is not."""
        plan = self.plan
        if plan.container != "compressor" or not plan.specs:
            return None, None
        if texts is None:
            return None, "no text was evaluated"
        if plan.device.type != "cpu":
            return None, f"the run was on {plan.device.type}"
        if not whole:
            return None, "the whole model does not fit the free memory"
        vocabulary = plan.skeleton.config.get_text_config().vocab_size
        return chosen_windows(texts.ids[texts.span(0)], vocabulary, plan.skeleton.parameters()), None

    def stop(self) -> None:
        """End the process if it still waits."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@torch.no_grad()
def recompute(request: dict[str, Any]) -> tuple[Tensor, Any]:
    """Logits (1, T, vocabulary) fp32 of a folder, as a newcomer's process would compute them without kernels.

    Returns:
        The logits, and the model, or None where it was not loaded as a whole.
    """
    from transformers import AutoModelForCausalLM

    folder, dtype = Path(request["folder"]), getattr(torch, request["dtype"])
    ids, device = torch.tensor(request["ids"]), torch.device(request["device"])
    if request["whole"]:
        integers = request["container"] == "compressed-tensors"
        more = {"gguf_file": request["gguf_file"]} if request.get("gguf_file") else {}
        with using("packed"):  # the kernels round activations: not what was written is judged here, but what is read
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if integers else dtype, **more)
            model = model.to(device).eval()
        if integers:  # its values are products in the stored dtype, made when it first runs
            model(input_ids=ids[:, :1].to(device), use_cache=False)
            model = model.to(dtype)
        return model(input_ids=ids.to(device), use_cache=False).logits.float().cpu(), model
    from compressor.engine.checkpoint import open_checkpoint
    from compressor.engine.forward import BlockRunner
    from compressor.engine.skeleton import build_skeleton

    runner = BlockRunner(build_skeleton(open_checkpoint(folder)), device=device, dtype=dtype)
    runner.load_outer()
    stream = runner.start(ids)
    runner.run(stream)
    return runner.logits(stream, slice(0, 1)).cpu(), None


def _cost(model: Any, ids: Tensor) -> dict[str, Any]:
    """`kernel_cost`; what goes wrong there says nothing against the folder."""
    try:
        return kernel_cost(model, ids)
    except Exception as error:
        return {"skipped": f"{type(error).__name__}: {error}"}


def by_reader(request: dict[str, Any], logits: Tensor) -> dict[str, Any] | None:
    """Load the folder as someone without compressor does, by the reader file in it, and compare its logits.

    Returns:
        ``difference``, the largest of a logit, or ``problem``; None where there is no such file or no room.
    """
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import HF_MODULES_CACHE

    if not request["whole"] or request["container"] != "compressor":
        return None
    forget()
    dtype, device = getattr(torch, request["dtype"]), torch.device(request["device"])
    try:
        model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=dtype, trust_remote_code=True)
        if not any(
            Path(sys.modules[type(each).__module__].__file__ or "").is_relative_to(HF_MODULES_CACHE)
            for each in model.modules()
        ):
            return {"problem": "transformers did not use the reader file"}
        ids = torch.tensor(request["ids"]).to(device)
        with torch.no_grad():
            again = model.to(device).eval()(input_ids=ids, use_cache=False).logits.float().cpu()
        return {"difference": float((again - logits).abs().max())}
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"}


@without_bars()  # standard error is the user's
def serve() -> None:
    """Answer the one request on standard input."""
    end_quickly()
    with uncollected():  # while the other process still works
        import transformers.modeling_utils  # noqa: F401
        from transformers.utils import logging

    logging.set_verbosity_error()

    line = sys.stdin.readline()
    if not line.strip():
        return
    request = json.loads(line)
    answer: dict[str, Any] = dict.fromkeys(("problem", "kernels", "samples", "reader")) | {"seconds": 0.0}
    try:
        logits, model = recompute(request)
        torch.save(logits, request["target"])
        since = time.perf_counter()
        answer["samples"] = request["samples"] and continuations(model, request["samples"])
        answer["seconds"] = time.perf_counter() - since
        answer["kernels"] = request["measured"] and _cost(model, torch.tensor(request["measured"]))
        del model  # two of them need not fit
        answer["reader"] = by_reader(request, logits)
    except Exception as error:
        answer["problem"] = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), flush=True)
