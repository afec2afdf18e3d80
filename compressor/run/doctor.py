"""What ``compressor doctor`` finds out about an installation: fact by fact, and whether it is as it should be."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch

import compressor
from compressor.errors import UserError
from compressor.kernels.layers import ACTIVATIONS, exact_activations
from compressor.kernels.native import VARIABLE, Native, rung_and_why, search
from compressor.report.numbers import bytes_text

BESIDE = ("tokenizers", "triton", "peft", "lm-eval", "gguf", "mlx")
"""Packages that are used where they are there, but not required."""

LITTLE = 2 * 10**9
"""Bytes of disk below which it is a problem."""


PATIENCE = 3
"""Seconds that the hub has to answer."""


@dataclass(frozen=True)
class Fact:
    """One line of the doctor's.

    Attributes:
        name: of what.
        value: what was found.
        wrong: whether something has to be done about it.
    """

    name: str
    value: str
    wrong: bool = False


def examine() -> list[Fact]:
    """Look at versions, devices, kernels, disks and the hub. Nothing is changed. A `Fact` is a line of the doctor's.

    The hub is asked one question, who the token belongs to, and has `PATIENCE` seconds to answer; none when offline.
    """
    return [*_versions(), *_devices(), *_kernels(), *_disks(), *_hub()]


def _versions() -> Iterator[Fact]:
    yield Fact("compressor", f"{compressor.__version__} in {Path(compressor.__file__).parent}")
    yield Fact("python", f"{platform.python_version()} ({sys.executable})")
    yield Fact("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    for name, needed in _requirements().items():
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Fact(name, f"not installed, {needed or 'any'} is needed", wrong=True)
            continue
        fits = _fits(found, needed)
        yield Fact(name, found if fits else f"{found}, but {needed} is needed", wrong=not fits)
    for name in BESIDE:
        try:
            yield Fact(name, version(name))
        except PackageNotFoundError:
            yield Fact(name, "not installed (optional)")


def _requirements() -> dict[str, str]:
    """Package -> versions that compressor's metadata ask for."""
    from packaging.requirements import InvalidRequirement, Requirement

    found = {}
    try:
        for line in requires("compressor") or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                found[requirement.name] = str(requirement.specifier)
    except (PackageNotFoundError, InvalidRequirement):  # run from a checkout
        return {"torch": "", "transformers": "", "accelerate": ""}
    return found


def _fits(found: str, needed: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(needed).contains(found, prereleases=True)
    except InvalidVersion:
        return True


def _devices() -> Iterator[Fact]:
    memory = psutil.virtual_memory()
    cores = f"{os.cpu_count()} processors, {torch.get_num_threads()} threads"
    yield Fact("cpu", f"{cores}; {bytes_text(memory.available)} of {bytes_text(memory.total)} free")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Fact(f"cuda:{index}", f"{device.name}, {bytes_text(device.total_memory)}")
    if torch.cuda.device_count() == 0:
        yield Fact("cuda", "none" if torch.version.cuda else "none: this PyTorch is built without")
    if torch.backends.mps.is_available():
        yield Fact("mps", "Apple graphics")


def kernels_text(found: Native) -> str:
    """The instruction sets that compiled kernels have for this processor, in words."""
    return f"{', '.join(reversed(found.levels))}{' with bf16 products' if found.bf16 else ''}"


def _kernels() -> Iterator[Fact]:
    found, skipped = search()
    for line in skipped:
        yield Fact("kernels", f"not loaded: {line}", wrong=found is None)
    yield Fact("kernels", "not compiled; run `compressor kernels build`" if found is None else str(found.file))
    if found is not None:
        yield Fact("instruction sets", kernels_text(found))
    try:
        rung, why = rung_and_why()
        yield Fact("packed matrices", f"by {rung}: {why}")
    except UserError as error:
        yield Fact("packed matrices", str(error), wrong=True)
    try:
        yield Fact("activations", "exact" if exact_activations() else "int8")
    except UserError as error:
        yield Fact("activations", str(error), wrong=True)
    for name in (VARIABLE, ACTIVATIONS):
        yield Fact(name, os.environ.get(name, "not set"))


def _disks() -> Iterator[Fact]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder in (("disk here", Path.cwd()), ("disk of hub cache", Path(HF_HUB_CACHE))):
        place = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
        free = shutil.disk_usage(place).free
        yield Fact(name, f"{bytes_text(free)} free for {folder}", wrong=free < LITTLE)


def _hub() -> Iterator[Fact]:
    """Whether models can be fetched and uploaded. To be without a network is nothing wrong."""
    import httpx2
    from huggingface_hub import constants, get_token

    token, hub = get_token(), constants.ENDPOINT
    if constants.is_offline_mode():
        yield Fact("hub", f"{hub} is not asked: HF_HUB_OFFLINE is set")
        return
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx2.get(f"{hub}/api/whoami-v2", headers=headers, timeout=PATIENCE)
        name = answer.json().get("name") if answer.status_code == 200 else None
    except (httpx2.HTTPError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        yield Fact("hub", f"{hub} cannot be reached ({reason}); models in the cache can be used")
        return
    odd = answer.status_code not in (200, 401)
    yield Fact("hub", f"{hub} answers{f', but with status {answer.status_code}' if odd else ''}")
    if token is None:
        yield Fact("hub token", "none: public models can be fetched; HF_TOKEN or `hf auth login` for all else")
    elif name is not None:
        yield Fact("hub token", f"accepted, of {name}")
    elif answer.status_code == 401:
        yield Fact("hub token", "refused; make another and set HF_TOKEN (or run `hf auth login`)", wrong=True)
