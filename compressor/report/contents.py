"""What a model folder holds, from its headers and config.json alone: modules, formats, bits, sparsity, size ledger."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from compressor.engine.checkpoint import Checkpoint, open_checkpoint, resolve_model
from compressor.engine.tensorfile import TensorEntry
from compressor.errors import UserError
from compressor.report.names import block_index, natural
from compressor.report.schema import GROUPS, Group, LedgerRow
from compressor.report.storage import OWN, PLAIN, Storage, storage_of

ABOUT = frozenset({"report.json", "report.html", "README.md", ".gitattributes"})
"""Files about the model rather than of it: not counted as its size."""

EMBEDDING = re.compile(r"(^|\.)(embed\w*|wte|wpe|lm_head|output_projection)\.")
MEMORY = re.compile(r"\.lin_[a-z]\w*(\.|$)")  # what linearizing adds to an attention
# the parts of one packed matrix, as the quantizers name them: module path, then part
PARTS = re.compile(
    r"(?P<module>.*?)(\.weight\.|_|\.)(?P<part>qweight|qzeros|scales|biases|g_idx|weight_packed|weight_scale\w*"
    r"|weight_shape|weight_zero_point|weight_g_idx|weight_global_scale|input_scale|input_global_scale|blocks|SCB|weight_format"
    r"|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)"
)
SCAN_STEP = 1 << 24  # elements counted at once: bounds the mask that counting makes
MAIN = frozenset({"qweight", "weight_packed", "weight", "blocks"})


@dataclass(frozen=True)
class Item:
    """One weight of the source model, whatever number of tensors it takes.

    Attributes:
        shape: of the source's tensor; (outputs, inputs) of a matrix.
        tensors, parameters, bytes: tensors on disk, source parameters, bytes on disk without headers.
        own: parameters as they are stored, where these are others: of a product the entries of its factors.
        sparsity: fraction of zeros, where known without reading weights (or after a scan).
    """

    name: str
    group: Group
    format: str
    shape: tuple[int, ...]
    tensors: int
    parameters: int
    bytes: int
    sparsity: float | None = None
    own: int | None = None

    @property
    def stored_parameters(self) -> int:
        """Parameters of the model as it is."""
        return self.parameters if self.own is None else self.own

    @property
    def bits_per_weight(self) -> float | None:
        """Bits on disk for each source parameter."""
        return 8 * self.bytes / self.parameters if self.parameters else None


@dataclass(frozen=True)
class Contents:
    """A folder: its items in the order of their names, and the bytes that are no tensors.

    Attributes:
        weight_bytes: size of the weight files; ``container_bytes`` of it are headers and padding.
        other_bytes: size of all other files but those in ``ABOUT``.
    """

    folder: Path
    config: dict[str, Any]
    storage: Storage
    items: tuple[Item, ...]
    weight_bytes: int
    other_bytes: int

    @property
    def parameters(self) -> int:
        """Source parameters; tied tensors that are stored once count once."""
        return sum(item.parameters for item in self.items)

    @property
    def stored_parameters(self) -> int:
        """Parameters of the model as it is: where matrices are products, those of the factors."""
        return sum(item.stored_parameters for item in self.items)

    @property
    def container_bytes(self) -> int:
        """Headers and padding of the weight files."""
        return self.weight_bytes - sum(item.bytes for item in self.items)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the model on disk."""
        return self.weight_bytes + self.other_bytes

    def bits(self, *groups: Group) -> float | None:
        """Bits per source parameter over ``groups``; over everything when none is given."""
        chosen = [item for item in self.items if not groups or item.group in groups]
        parameters = sum(item.parameters for item in chosen)
        return 8 * sum(item.bytes for item in chosen) / parameters if parameters else None

    def ledger(self, source: Contents | None = None) -> list[LedgerRow]:
        """Bytes by group and format, as in a report.

        Args:
            source: the folder this one was made from; fills ``source_bytes`` of the rows all of whose items it holds.
        """
        cells: dict[tuple[Group, str], list[Item]] = {}
        for item in self.items:
            cells.setdefault((item.group, item.format), []).append(item)
        total = self.disk_bytes or 1
        rows = [_row(group, form, members, total, source) for (group, form), members in cells.items()]
        if self.container_bytes:
            form = self._container()
            before = source.container_bytes if source else None
            rows.append(_extra("container", form, self.container_bytes, total, before))
        before = source.other_bytes if source else None
        if self.other_bytes or self.folder.is_dir():
            rows.append(_extra("config, tokenizer, reader", "files", self.other_bytes, total, before))
        return sorted(rows, key=lambda row: (GROUPS.index(row.group), -row.bytes))

    def bytes_of(self, name: str) -> int | None:
        """Bytes of the item of this name, also when it stands here without the prefix of the whole model."""
        short = name.removesuffix(".weight")
        while short not in self._bytes_by_name and "." in short:
            short = short.split(".", 1)[1]
        return self._bytes_by_name.get(short)

    @cached_property
    def _bytes_by_name(self) -> dict[str, int]:
        return {item.name.removesuffix(".weight"): item.bytes for item in self.items}

    def _container(self) -> str:
        if self.storage.method == "gguf":
            return "gguf header, with the tokenizer"
        return "safetensors headers" if any(self.folder.glob("*.safetensors")) else "pickle"


def _row(group: Group, form: str, members: Sequence[Item], total: int, source: Contents | None) -> LedgerRow:
    before: list[int | None] = [source.bytes_of(item.name) if source else None for item in members]
    if source and group == "attention memory":  # new: the source had nothing in its place
        before = [0] * len(members)
    known = [count for count in before if count is not None]
    count, parameters = sum(item.bytes for item in members), sum(item.parameters for item in members)
    if source and group == "embeddings" and len(known) < len(before):  # tied: either of two names may be the stored one
        there = [item for item in source.items if item.group == group]
        if sum(item.parameters for item in there) == parameters:
            known = [item.bytes for item in there]
            before = [*known]
    return LedgerRow(
        group=group,
        format=form,
        tensors=sum(item.tensors for item in members),
        parameters=parameters,
        stored_parameters=sum(item.stored_parameters for item in members),
        bytes=count,
        source_bytes=sum(known) if len(known) == len(before) else None,
        bits_per_weight=8 * count / parameters if parameters else None,
        share=count / total,
    )


def _extra(group: Group, form: str, count: int, total: int, before: int | None) -> LedgerRow:
    return LedgerRow(group=group, format=form, bytes=count, source_bytes=before, share=count / total)


def read_contents(folder: Path | str, *, scan: bool = False, carried_over: Collection[str] = ()) -> Contents:
    """Look into a model folder.

    Args:
        folder: a local folder, a hub id (which is fetched), or ``embedded`` for the model that comes with compressor.
        carried_over: names of tensors that no module owns; headers alone do not tell.
        scan: read the dense matrices and count their zeros; otherwise no weight is read.

    Returns:
        ``items``, one for each weight of the source; ``weight_bytes``, ``parameters``, ``stored_parameters``;
        ``bits()``, of some groups or of all; ``ledger()``, bytes by group and format; ``storage.loads``, what loads it.

    Raises:
        UserError: no such folder or hub id, not a model folder, corrupt or missing files, or a manifest that does not
            fit them.
    """
    folder = resolve_model(str(folder))
    checkpoint = open_checkpoint(folder)
    storage = storage_of(checkpoint.config, folder)
    items = tuple(_items(checkpoint, storage))
    owned_by_none = frozenset(carried_over)
    items = tuple(replace(item, group="carried over") if item.name in owned_by_none else item for item in items)
    if scan:
        items = tuple(_scanned(checkpoint, item) for item in items)
    weight_files = {file.name for file in checkpoint.files}
    other = sum(
        file.stat().st_size
        for file in folder.iterdir()
        if file.is_file() and file.name not in weight_files and file.name not in ABOUT
    )
    return Contents(folder, checkpoint.config, storage, items, checkpoint.disk_bytes, other)


def _items(checkpoint: Checkpoint, storage: Storage) -> Iterator[Item]:
    config = checkpoint.config
    vocabulary = (config.get("text_config") or config).get("vocab_size")
    linearized = bool(config.get("linear_attention"))
    rest = dict(sorted(checkpoint.tensors.items(), key=lambda pair: natural(pair[0])))
    if storage.method == OWN:
        manifest = (config.get("quantization_config") or {}).get("modules")
        for module, spec in manifest.items() if isinstance(manifest, dict) else ():
            yield _packed_item(module, spec, rest)
    elif storage.method != PLAIN:
        yield from _foreign_items(checkpoint, storage, rest)
    for entry in rest.values():
        item = _plain_item(entry, vocabulary)
        yield replace(item, group="attention memory") if linearized and MEMORY.search(entry.name) else item


def _form(spec: dict[str, Any]) -> str:
    """A format and what of its settings decides its size."""
    return f"{spec['format']}, {spec['bits']} bits" if "bits" in spec else str(spec["format"])


def _packed_item(module: str, spec: dict[str, Any], rest: dict[str, TensorEntry]) -> Item:
    """An item of our manifest; its parts are taken out of ``rest``."""
    names = [name for name in rest if name == f"{module}.weight" or name.startswith(f"{module}.weight_")]
    if not names:
        raise UserError(f"the manifest lists {module!r}, but no weight file holds it", fix="fetch the folder again")
    try:
        shape = tuple(int(side) for side in spec["shape"])
        form = _form(spec)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the manifest has an unreadable entry for {module!r}", fix="fetch the folder again") from error
    parts = [rest.pop(name) for name in names]
    sparsity = None
    weights = prod(shape)
    if "nnz" in spec and spec["format"] != "partial-binary" and weights > 0:  # there it counts the salient weights
        sparsity = 1 - spec["nnz"] / weights
    elif form == "nm":
        sparsity = 1 - spec["n"] / spec["m"]
        form = f"nm {spec['n']}:{spec['m']}"
    if form == "sum":
        form = f"{_form(spec['base'])} + rank {spec['correction']['left']['shape'][1]}"
    group: Group = "kept linears" if form == "dense" else "compressed linears"
    if block_index(module) is None and EMBEDDING.search(f"{module}."):
        group = "embeddings"
    return Item(
        name=module,
        group=group,
        format=form,
        shape=shape,
        tensors=len(parts),
        parameters=prod(shape),
        bytes=sum(part.nbytes for part in parts),
        sparsity=sparsity,
        own=_entries(spec) if spec["format"] in ("low-rank", "sum") else None,
    )


def _entries(spec: dict[str, Any]) -> int:
    """Entries of what is stored for a matrix; a factor that lies beside another module is counted there."""
    if spec["format"] == "sum":
        return _entries(spec["base"]) + _entries(spec["correction"])
    if spec["format"] == "low-rank":
        return sum(prod(spec[side]["shape"]) for side in ("left", "right") if side == "left" or "shared" not in spec)
    return prod(spec["shape"])


def _foreign_items(checkpoint: Checkpoint, storage: Storage, rest: dict[str, TensorEntry]) -> Iterator[Item]:
    """Matrices of another quantizer: a main tensor and its companions, all taken out of ``rest``."""
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name in rest:
        if found := PARTS.fullmatch(name):
            modules.setdefault(found["module"], {})[found["part"]] = rest[name]
    for module, parts in modules.items():
        if f"{module}.weight" in rest:
            parts["weight"] = rest[f"{module}.weight"]
        main = next((parts[part] for part in parts if part in MAIN), None)
        if main is None:
            continue
        own = (checkpoint.config.get("quantization") or {}).get(module)  # MLX: where a matrix has other bits
        bits = own["bits"] if isinstance(own, dict) and isinstance(own.get("bits"), int) else storage.bits
        shape = _unpacked_shape(main, replace(storage, bits=bits))
        if (stored := parts.get("weight_shape")) is not None:  # compressed-tensors: the exact shape, and so the bits
            shape = tuple(int(side) for side in checkpoint.read(stored.name).tolist())
            bits = main.shape[-1] * main.dtype.itemsize * 8 // shape[-1] if shape[-1] else bits
        for part in parts.values():
            rest.pop(part.name)
        yield Item(
            name=module,
            group="compressed linears",
            format=f"{storage.method}, {bits} bits" if bits else storage.method,
            shape=shape,
            tensors=len(parts),
            parameters=prod(shape),
            bytes=sum(part.nbytes for part in parts.values()),
        )


def _unpacked_shape(main: TensorEntry, storage: Storage) -> tuple[int, ...]:
    """The source's shape of a packed tensor; the packed one where the method does not tell how it packs."""
    element = main.dtype.itemsize * 8
    if main.dtype.is_floating_point or not storage.bits or storage.bits >= element or not main.shape:
        return main.shape
    shape = list(main.shape)
    if storage.method == "gptq":  # (inputs packed, outputs)
        return (shape[1], shape[0] * element // storage.bits)
    if storage.method == "awq":  # (inputs, outputs packed)
        return (shape[1] * element // storage.bits, shape[0])
    if storage.method == "bitsandbytes":  # flattened to one column
        return (main.numel * element // storage.bits,)
    return (*shape[:-1], shape[-1] * element // storage.bits)


def _plain_item(entry: TensorEntry, vocabulary: Any) -> Item:
    in_block = block_index(entry.name) is not None
    group: Group = "norms and others"
    if not in_block and len(entry.shape) == 2 and (EMBEDDING.search(entry.name) or entry.shape[0] == vocabulary):
        group = "embeddings"
    elif in_block and len(entry.shape) in (2, 3) and entry.dtype.is_floating_point and min(entry.shape) > 1:
        group = "kept linears"
    name = str(entry.dtype).removeprefix("torch.")
    return Item(entry.name, group, name, entry.shape, 1, entry.numel, entry.nbytes)


def _scanned(checkpoint: Checkpoint, item: Item) -> Item:
    """The item with its zeros counted, when it is one dense tensor of at least two dimensions."""
    name = item.name if item.name in checkpoint.tensors else f"{item.name}.weight"
    entry = checkpoint.tensors.get(name)
    if item.sparsity is not None or item.tensors != 1 or entry is None or len(entry.shape) < 2 or not entry.numel:
        return item
    if entry.dtype.itemsize == 1 or not entry.dtype.is_floating_point:
        return item
    flat, kept = checkpoint.read(name).reshape(-1), 0
    for start in range(0, entry.numel, SCAN_STEP):
        kept += int(flat[start : start + SCAN_STEP].count_nonzero())
    return replace(item, sparsity=1 - kept / entry.numel)
