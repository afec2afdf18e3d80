"""What a GGUF file holds, as `contents` tells it of a folder: from its headers alone."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compressor.errors import UserError
from compressor.report.contents import Contents, Item
from compressor.report.names import natural
from compressor.report.schema import Group
from compressor.report.storage import Storage

SUFFIX = ".gguf"
PLAIN = frozenset({"F32", "F16", "BF16", "F64"})
IN_BLOCK = re.compile(r"blk\.\d+\.")
OUTER = re.compile(r"(token_embd|output)\.weight")


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that ``path`` is, or the only one in a folder that is no model folder; ``None`` otherwise."""
    if path.is_file() and path.suffix == SUFFIX:
        return path
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() and not (path / "config.json").exists() else []
    return files[0] if len(files) == 1 else None


def read_gguf(path: Path) -> Contents:
    """Look into a GGUF file; no weight is read.

    Raises:
        UserError: the ``gguf`` package is absent, or cannot read the file.
    """
    if find_spec("gguf") is None:
        raise UserError("reading gguf needs the package gguf", fix='pip install "compressor[gguf]"')
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        items = tuple(_item(tensor) for tensor in sorted(reader.tensors, key=lambda tensor: natural(str(tensor.name))))
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} cannot be read as gguf: {error}", fix="fetch or make the file again") from error
    architecture = str(_value(reader, "general.architecture") or "unknown")
    head = any(item.name == "output.weight" for item in items)
    config = {
        "model_type": f"gguf {architecture}",
        "architectures": [_value(reader, "general.name") or "no name"],
        "tie_word_embeddings": not head,
    }
    vocabulary = str(_value(reader, "tokenizer.ggml.model") or "no_vocab")
    tokens = "by token ids alone: it holds no tokenizer" if vocabulary == "no_vocab" else f"tokenizer {vocabulary}"
    loads = (
        f"llama.cpp and what is built on it, where it knows the architecture {architecture} ({tokens})",
        f"transformers with the gguf package: from_pretrained(FOLDER, gguf_file={path.name!r}), unpacked",
    )
    storage = Storage("gguf", None, loads, ("vLLM by itself", "mlx-lm"))
    return Contents(path, config, storage, items, path.stat().st_size, 0)


def _value(reader: Any, key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()


def _item(tensor: Any) -> Item:
    kind, shape = str(tensor.tensor_type.name), tuple(int(side) for side in reversed(tensor.shape))
    group: Group = "norms and others"
    if OUTER.fullmatch(tensor.name):
        group = "embeddings"
    elif IN_BLOCK.match(tensor.name) and len(shape) > 1:
        group = "kept linears" if kind in PLAIN else "compressed linears"
    return Item(str(tensor.name), group, kind, shape, 1, int(tensor.n_elements), int(tensor.n_bytes))
