"""A model as a whole in memory, the way a user would load it: packed layers with their kernels, linearized ones too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.engine.checkpoint import open_checkpoint, resolve_model
from compressor.engine.limits import available_memory
from compressor.engine.skeleton import Skeleton, build_skeleton
from compressor.errors import UserError
from compressor.run.inputs import load_tokenizer
from compressor.run.network import load_whole
from compressor.run.plan import choose_device, choose_dtype, context_length


@dataclass(frozen=True)
class Found:
    """A model that could be loaded: its headers were read, nothing else.

    Attributes:
        name: as it was asked for.
        trust: whether code of the folder may run.
    """

    name: str
    skeleton: Skeleton
    trust: bool

    @property
    def folder(self) -> Path:
        return self.skeleton.checkpoint.folder

    @property
    def context(self) -> int | None:
        """Longest context in tokens, if the configuration says."""
        return context_length(self.skeleton.config)

    def check_room(self) -> None:
        """Raises UserError: the weights are larger than the free memory."""
        size, free = self.skeleton.checkpoint.nbytes, available_memory()
        if size > free:
            raise UserError(f"{self.name} has {size / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB are free")

    def tokenizer(self) -> Any:
        """Load its tokenizer. UserError: there is none."""
        return load_tokenizer(self.folder, trust_remote_code=self.trust)

    def load(self, *, dtype: str = "auto", device: str = "auto") -> Any:
        """Load it through transformers, ready to run.

        Raises:
            UserError: unknown dtype or device.
        """
        place = choose_device(device)
        precision = choose_dtype(dtype, place, self.skeleton.linears[0].dtype)
        return load_whole(self.folder, dtype=precision, device=place, trust_remote_code=self.trust)


def find_model(name: str, *, trust_remote_code: bool = False) -> Found:
    """Find a model and read its headers.

    Raises:
        UserError: unknown, incomplete, or larger than the free memory.
    """
    checkpoint = open_checkpoint(resolve_model(name))
    found = Found(name, build_skeleton(checkpoint, trust_remote_code=trust_remote_code), trust_remote_code)
    found.check_room()
    return found
