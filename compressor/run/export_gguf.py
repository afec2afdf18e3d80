"""Write a model as a GGUF file, for llama.cpp and what is built on it.

Everything is looked at once before the work: each matrix is put into its type and read back, so that what is rounded,
and by how much, is said first. Then it is written tensor by tensor, and the file is read again, by the ``gguf``
package, before it takes its place.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compressor.engine.checkpoint import open_checkpoint, resolve_model
from compressor.engine.output import LICENCES, building, check_disk, copy_companions
from compressor.engine.skeleton import Skeleton, build_skeleton
from compressor.errors import UserError
from compressor.report.numbers import bytes_text, percent
from compressor.report.schema_use import Runtime
from compressor.run.export import Exported, check_place, model_name
from compressor.run.export_about import Use, write_about
from compressor.run.export_check import check_by_transformers
from compressor.run.gguf_arch import architecture, rope_factors, row_order, tensor_names, write_hyperparameters
from compressor.run.gguf_blocks import Bytes
from compressor.run.gguf_tokenizer import Vocabulary, read_vocabulary, write_vocabulary
from compressor.run.gguf_types import (
    BITS,
    CODES,
    Integers,
    decode,
    encode,
    exact_type,
    integers_of,
    loss,
    obstacle,
)

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37}
"""Type of most matrices -> GGUF's number for such a file."""

TERNARY = "compressor quantize --method trit-planes --planes 1 --group 256"
ROPE_FACTORS = "rope_freqs.weight"
NOTHING = 1e-6  # relative error of a tensor that no logit shows
ALIGNMENT = 32  # bytes; of tensors in the file


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Attributes:
        source: module tensor it is made from.
        group: what it is, in words: ``matrices``, ``embedding and output``, ``norms and biases``.
        shape: (rows, columns), or (size,) of what is no matrix.
        kind: its type.
        loss: of being written in that type, see `gguf_types.Encoded`.
        why: why it is not in the type that was asked for; empty where it is.
    """

    name: str
    source: str
    group: str
    shape: tuple[int, ...]
    kind: str
    loss: float = 0.0
    why: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return int(np.prod(self.shape) * BITS[self.kind]) // 8


@dataclass(frozen=True)
class Source:
    """The model to be written."""

    skeleton: Skeleton

    @cached_property
    def arch(self) -> str:
        """llama.cpp's name of the architecture; UserError when there is none."""
        return architecture(self.skeleton)

    def matrix(self, name: str) -> tuple[NDArray[np.float32], Integers | None]:
        """A module tensor as the folder says it, in fp32, and its integers where it is made of some."""
        origin = self.skeleton.origins[name]
        if not origin.packed:
            return self.skeleton.read(name).float().numpy(), None
        code = self.skeleton.representation(origin.name)
        return code.dense().float().numpy(), integers_of(code)

    def data(self, entry: Entry) -> Bytes:
        """What stands in the file: (rows, bytes of a row)."""
        values, integers = self.matrix(entry.source)
        data = encode(entry.kind, values.reshape(-1, values.shape[-1]), integers, entry.source).data
        order = row_order(entry.source, self.skeleton.config, self.arch)
        return data if order is None else np.ascontiguousarray(data[order])

    def in_order(self, entry: Entry) -> NDArray[np.float32]:
        """The values that a reader of the file must find, (rows, columns)."""
        values = self.matrix(entry.source)[0].reshape(-1, entry.shape[-1])
        order = row_order(entry.source, self.skeleton.config, self.arch)
        return values if order is None else values[order]


def export_gguf(
    model: str,
    output: Path,
    *,
    kind: str = "auto",
    tokenizer: str = "auto",
    verify: bool = True,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write a model, packed or not, as ``output/NAME-TYPE.gguf`` with a card beside it.

    Args:
        model: folder or hub id.
        output: folder, must not exist.
        kind: type of the matrices in the blocks: a key of `FILE_TYPES`, or ``auto``: for each what says its packed
            integers exactly, else F16.
        tokenizer: ``auto``, or ``none`` to leave it out.
        verify: let transformers, in a fresh process, load the file before it takes its place, and compare logits, where
            next to nothing is rounded.
        dry_run: say what would be written, and write nothing.
        say: takes lines, before the work.

    Raises:
        UserError: llama.cpp does not have the architecture or the tokenizer, the type cannot say the matrices, the
            ``gguf`` package is absent, a bad output, or a full disk.
    """
    if find_spec("gguf") is None:
        raise UserError("writing gguf needs the package gguf", fix='pip install "compressor[gguf]"')
    checkpoint = open_checkpoint(resolve_model(model))
    check_place(output, checkpoint.folder)
    source = Source(build_skeleton(checkpoint))
    config, arch = source.skeleton.config, source.arch
    vocabulary = Vocabulary("no_vocab") if tokenizer == "none" else read_vocabulary(checkpoint.folder, config)
    entries = _plan(source, kind)
    label = _label(entries)
    name = model_name(model)
    file = f"{name}-{label}.gguf"
    for line in _told(entries, vocabulary, f"{output / file} ({arch})"):
        say(line)
    notes = tuple(_notes(entries, source.skeleton, vocabulary))
    total = sum(entry.nbytes for entry in entries)
    done = Exported(
        matrices=sum(entry.group == "matrices" for entry in entries),
        tensor_bytes=total,
        form=f"gguf {label}",
        exact=not any(entry.loss for entry in entries),
        notes=notes,
    )
    if dry_run:
        return done
    check_disk(output, total + len(entries) * ALIGNMENT + (1 << 20), flag="DEST")
    with building(output) as folder:
        try:
            _write(folder / file, source, entries, vocabulary, name, label)
        except OSError as error:
            if error.errno is None:  # numpy's writer forgets the number, and what else would stop it?
                raise OSError(errno.ENOSPC, str(error)) from error
            raise
        runtimes = [_check(folder / file, source, entries, done.form)]
        rounding = max(entry.loss for entry in entries)
        if verify and rounding < NOTHING and vocabulary.model != "no_vocab":  # what more may change has no bound
            runtimes[:0] = check_by_transformers(checkpoint.folder, folder, done.form, gguf_file=file)
        copy_companions(checkpoint.folder, folder, LICENCES)
        return write_about(
            folder, checkpoint.folder, done, Use(_made_for(file, vocabulary), tag="gguf", runtimes=runtimes)
        )


def _made_for(file: str, vocabulary: Vocabulary) -> str:
    """How to load it, in Markdown."""
    if vocabulary.model == "no_vocab":
        return (
            "The file holds no tokenizer: programs must give it token ids (in the C interface, `llama_batch_get_one`)."
        )
    return f"""Made for llama.cpp, which was not run on this very file:

```sh
llama-server -m PATH/{file}
npx node-llama-cpp complete --text "Once upon a time" --model PATH/{file}
```"""


def _plan(source: Source, kind: str) -> list[Entry]:
    """The tensors of the file, those outside the blocks first, with their types and what these cost."""
    skeleton = source.skeleton
    names = tensor_names(skeleton, source.arch)
    entries, obstacles = [], []
    for name in (
        *skeleton.outer_tensors(),
        *(n for b in range(len(skeleton.blocks)) for n in skeleton.block_tensors(b)),
    ):
        shape = skeleton.stored(name)[1]
        if len(shape) < 2:
            entries.append(Entry(names[name], name, "norms and biases", shape, "F32"))
            continue
        values, integers = source.matrix(name)
        outer = not name.startswith(tuple(f"{block}." for block in skeleton.block_names))
        chosen, why = _outer_type(kind, integers, shape[1]) if outer else _block_type(kind, integers, shape[1])
        if chosen.startswith("TQ") and why:
            obstacles.append(f"{name}: {why}")
            continue
        lost = encode(chosen, values, integers, name).loss
        group = "embedding and output" if outer else "matrices"
        entries.append(Entry(names[name], name, group, shape, chosen, lost, why))
    if obstacles:
        raise UserError(
            f"{kind} has a trit a weight and one scale for 256 inputs, which {len(obstacles)} matrices are not, "
            f"such as {obstacles[0]}",
            fix=f"{TERNARY} makes such a folder where rows are multiples of 256; --type auto takes for each matrix "
            "what says it exactly",
        )
    return entries


def _block_type(kind: str, integers: Integers | None, columns: int) -> tuple[str, str]:
    """Type of a matrix in the blocks, and why it is not what was asked for (for TQ: why it cannot be)."""
    if kind == "auto":
        return exact_type(integers, columns) or "F16", ""
    if kind.startswith("TQ"):
        return kind, obstacle(kind, integers, columns) or ""
    if kind in CODES and columns % 32:
        return "F16", f"rows of {columns} are no blocks of 32"
    return kind, ""


def _outer_type(kind: str, integers: Integers | None, columns: int) -> tuple[str, str]:
    """Type of the embedding or the output: its own integers if it has some, else more bits than the blocks have."""
    if kind == "auto" or kind.startswith("TQ"):
        return exact_type(integers, columns) or "F16", ""
    if kind in CODES:
        return ("F16", f"rows of {columns} are no blocks of 32") if columns % 32 else ("Q8_0", "")
    return kind, ""


def _label(entries: Iterable[Entry]) -> str:
    """The type of most weights in the blocks: part of the file's name."""
    weights: dict[str, int] = {}
    for entry in entries:
        if entry.group == "matrices":
            weights[entry.kind] = weights.get(entry.kind, 0) + int(np.prod(entry.shape))
    return max(weights, key=lambda kind: weights[kind])


def _told(entries: list[Entry], vocabulary: Vocabulary, what: str) -> Iterator[str]:
    """What is going to be written, in lines."""
    yield f"{what}: {len(entries)} tensors, {bytes_text(sum(entry.nbytes for entry in entries))}"
    alike: dict[tuple[str, str, bool, str], list[Entry]] = {}
    for entry in entries:
        alike.setdefault((entry.group, entry.kind, bool(entry.loss), entry.why), []).append(entry)
    for (group, kind, is_rounded, why), members in alike.items():
        size = bytes_text(sum(entry.nbytes for entry in members))
        how = _rounding(members) if is_rounded else "exact"
        yield f"  {group:<20} {len(members):>4} x {kind:<5} {size:>9}  {how}{f'; {why}' if why else ''}"
    yield f"  tokenizer            {vocabulary.told()}"


def _rounding(members: list[Entry]) -> str:
    return f"rounded: root mean square error up to {percent(max(entry.loss for entry in members), 3)} of a matrix"


def _notes(entries: list[Entry], skeleton: Skeleton, vocabulary: Vocabulary) -> Iterator[str]:
    lossy: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.loss:
            lossy.setdefault((entry.group, entry.kind), []).append(entry)
    for (group, kind), members in lossy.items():
        yield f"{group}: {len(members)} in {kind}, {_rounding(members)}"
    yield from sorted({f"{entry.group}: {entry.why}, hence {entry.kind}" for entry in entries if entry.why})
    yield from (f"left out: the tensor {name}, which the model does not use" for name in skeleton.extra)
    if vocabulary.model == "no_vocab":
        yield "left out: the tokenizer"
    yield from vocabulary.notes


def _write(path: Path, source: Source, entries: list[Entry], vocabulary: Vocabulary, name: str, label: str) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, source.arch)
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[label])
        writer.add_quantization_version(2)
        write_hyperparameters(writer, source.skeleton.config)
        write_vocabulary(writer, vocabulary)
        factors = rope_factors(source.skeleton.config)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for entry in entries:
            row = int(entry.shape[-1] * BITS[entry.kind]) // 8
            shape = (*entry.shape[:-1], row)
            number = GGMLQuantizationType[entry.kind]
            writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), entry.nbytes, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for entry in entries:
            writer.write_tensor_data(source.data(entry))
        writer.flush()
    finally:
        writer.close()


def _check(path: Path, source: Source, entries: list[Entry], form: str) -> Runtime:
    """Read the file with the ``gguf`` package: every tensor has the values, or the error, that was said.

    Returns:
        What was checked, for the report.

    Raises:
        UserError: names a tensor that does not.
    """
    from gguf import GGUFReader

    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    if set(found) - {ROPE_FACTORS} != {entry.name for entry in entries}:
        raise UserError(f"{path.name} does not hold the tensors that were written", fix="this is a bug: report it")
    for entry in entries:
        tensor = found[entry.name]
        values = decode(tensor.tensor_type.name, tensor.data).reshape(-1, entry.shape[-1])
        wanted = source.in_order(entry)
        if values.shape != wanted.shape or loss(values, wanted) > entry.loss * (1 + 1e-6):
            raise UserError(f"{path.name}: {entry.name} reads otherwise than it was written", fix="report this bug")
    most = max(entry.loss for entry in entries)
    return Runtime(
        name="gguf",
        version=version("gguf"),
        form=form,
        command=f'from gguf import GGUFReader\n\ntensors = GGUFReader("PATH/{path.name}").tensors',
        check="every tensor, read back: root mean square error over that of the tensor",
        difference=most,
        allowed=most,
        passed=True,
    )
