"""compressor: make Hugging Face causal language models smaller and faster, and know what it cost.

Importing this package teaches ``transformers`` to read what it writes: after ``import compressor``,
``AutoModelForCausalLM.from_pretrained(folder)`` returns the ordinary model class with packed layers.
"""

from __future__ import annotations

from typing import Any

from compressor.hf.autoload import install as _install

__version__ = "0.1.0"

_install()


def accelerate(model: Any, way: str | None = None) -> Any:
    """Make a loaded model with packed layers fast where it is now; see `compressor.hf.fast.accelerate`."""
    from compressor.hf.fast import accelerate as make_fast

    return make_fast(model, way)
