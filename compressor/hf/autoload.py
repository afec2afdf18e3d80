"""Make our model type known to transformers as soon as it is imported, without importing it.

``import compressor`` must work before or after ``import transformers``, and ``compressor --help`` must not wait
seconds for transformers. So when transformers is not there yet, a finder at the head of ``sys.meta_path`` waits for
the one module that maps model types to configurations, lets the other finders import it as usual, and registers when
it has run. Then it takes itself away. It touches no other import.

What is registered is a stand-in: at that moment transformers may be half imported, so the code that needs all of it
(``loading.py``) runs when the first packed folder is read.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from compressor.hf.manifest import MODEL_TYPE

AWAITED = "transformers.models.auto.configuration_auto"


class CompressorConfig:
    """Stands in for ``loading.CompressorConfig`` until the first packed folder is read."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Register everything, and return the configuration of the packed folder."""
        loading = importlib.import_module("compressor.hf.loading")
        loading.register()
        importlib.import_module("compressor.hf.fast").register()
        return loading.CompressorConfig.from_dict(config_dict, **kwargs)


def install() -> None:
    """Make the model type known now when transformers is in use, else as soon as it is. May be called again."""
    if AWAITED in sys.modules:
        _make_known(sys.modules[AWAITED])
    elif not any(isinstance(finder, _Awaiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiting())


def _make_known(configuration_auto: ModuleType) -> None:
    configuration_auto.AutoConfig.register(MODEL_TYPE, CompressorConfig, exist_ok=True)


def forget() -> None:
    """Let transformers no longer know the model type, as where compressor is not installed: to try the reader file."""
    sys.modules[AWAITED].CONFIG_MAPPING._extra_content.pop(MODEL_TYPE, None)


class _Awaiting(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """The loader of the awaited module, which registers once the module has run."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _make_known(module)
