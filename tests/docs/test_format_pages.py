"""The pages of the formats are precise enough to read files by: their readers, in numpy, against the package's.

Each page's reader knows nothing of the package; what it makes is compared bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from doc_blocks import ROOT, blocks_of
from torch import Tensor

from compressor.formats.bitmask import pack_bitmask
from compressor.formats.dense import Dense
from compressor.formats.group_int import GroupInt, portable_scale
from compressor.formats.low_rank import LowRank
from compressor.formats.nm import pack_nm
from compressor.formats.partial_binary import PartialBinary
from compressor.formats.parts import parse_dtype
from compressor.formats.registry import FORMATS, format_of
from compressor.formats.scaled_binary import ScaledBinary
from compressor.formats.sparse_int import pack_sparse_int
from compressor.formats.sum import Sum
from compressor.formats.trit_planes import TritPlanes

FOLDER = ROOT / "docs" / "formats"
Sample = tuple[dict[str, Tensor], dict[str, Any]]


def readers() -> dict[str, Callable[..., Any]]:
    """Format -> the function ``read`` of its page, with what the page on bits defines."""
    found: dict[str, Callable[..., Any]] = {}
    for name in FORMATS:
        names: dict[str, Any] = {"READERS": found}
        for page in ("bits", name):
            code = "".join(block.body for block in blocks_of(FOLDER / f"{page}.md") if block.kind == "python")
            exec(compile(code, f"docs/formats/{page}.md", "exec"), names)
        found[name] = names["read"]
    return found


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=random(seed))


def below(limit: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, limit, shape, generator=random(seed))


def bitmask() -> Sample:
    weight, mask = normal(5, 13).half(), normal(5, 13, seed=1) > 0
    spec = {"format": "bitmask", "shape": [5, 13], "dtype": "float16", "nnz": int(mask.sum())}
    return pack_bitmask(weight, mask), spec


def nm(n: int, m: int) -> Sample:
    places = torch.rand(6, 3, m, generator=random(2)).argsort(2) < n
    places[0, 0] = False  # a group that keeps fewer is filled up
    spec = {"format": "nm", "shape": [6, 3 * m], "dtype": "float32", "n": n, "m": m}
    return pack_nm(normal(6, 3 * m), places.view(6, 3 * m), n, m), spec


def sparse_int(bits: int) -> Sample:
    mask = normal(4, 11, seed=3) > 0
    codes, zero = below(2**bits, 4, 11).to(torch.uint8), below(2**bits, 4, seed=4).to(torch.uint8)
    spec = {"format": "sparse-int", "shape": [4, 11], "dtype": "float32", "nnz": int(mask.sum()), "bits": bits}
    return pack_sparse_int(codes, normal(4).half(), zero, mask, bits), spec


def group_int(bits: int, *, zero: bool, m: int = 5, n: int = 12) -> GroupInt:
    low = 2 ** (bits - 1)
    scale = portable_scale(normal(m, n // 4), bits)
    zeros = (below(2 * low, m, n // 4, seed=5) - low).to(torch.int8) if zero else None
    return GroupInt((below(2 * low, m, n) - low).to(torch.int8), scale, zeros, bits)


def trit_planes(planes: int, m: int = 3, n: int = 9) -> TritPlanes:
    scale = normal(planes, m, 3).abs().half()
    return TritPlanes((below(3, planes, m, n) - 1).to(torch.int8), scale, 4)


def partial_binary(salient: Tensor, *, mean: bool = False, zero: bool = False, by_input: bool = False) -> PartialBinary:
    m, n = salient.shape
    step = torch.where(salient[:1], normal(1, n).half(), 0).half() if by_input else normal(m, 1).half()
    return PartialBinary(
        (normal(m, n, seed=6) > 0) & ~salient,
        normal(m, -(-n // 8)).half(),
        normal(m, -(-n // 8), seed=7).half() if mean else None,
        salient,
        below(16, m, n).to(torch.uint8) * salient,
        step,
        below(16, m, seed=8).to(torch.uint8) if zero else None,
        4,
        8,
    )


def scattered(share: float) -> Tensor:
    return torch.rand(20, 41, generator=random(9)) < share


def uneven() -> Tensor:
    """Marks that are cheaper by columns."""
    mask = torch.zeros(70, 40, dtype=torch.bool)
    mask[:, 3] = torch.rand(70, generator=random(10)) < 0.7
    return mask


def inputs() -> Tensor:
    return (torch.rand(1, 20, generator=random(11)) < 0.3).expand(6, 20).contiguous()


def scaled_binary() -> ScaledBinary:
    salient = torch.rand(15, generator=random(12)) < 0.3
    k = int(salient.sum())
    return ScaledBinary(
        normal(6, 15 - k) > 0,
        normal(6).half(),
        normal(6, seed=1).half(),
        normal(15 - k, seed=2).half(),
        salient,
        below(16, 6, k).to(torch.uint8),
        normal(6, seed=3).half(),
        below(16, 6).to(torch.uint8),
        4,
    )


def low_rank(*, coded: bool, n: int = 9) -> LowRank:
    if coded:
        return LowRank(group_int(4, zero=False, m=6, n=4), trit_planes(2, 4, n))
    return LowRank(Dense(normal(6, 4).half().float()), Dense(normal(4, n, seed=1).half().float()))


def made(code: Any) -> Sample:
    """The parts and spec of a representation whose matrix is fp32."""
    spec = code.spec(torch.float32)
    return (code.parts(torch.float32) if isinstance(code, GroupInt | Sum | Dense) else code.parts()), spec


SAMPLES: dict[str, Callable[[], Sample]] = {
    "dense": lambda: made(Dense(normal(3, 4))),
    "bitmask": bitmask,
    "nm 2:4": lambda: nm(2, 4),
    "nm 4:8": lambda: nm(4, 8),
    "nm 3:7": lambda: nm(3, 7),
    "nm 16:32": lambda: nm(16, 32),
    "sparse-int 3": lambda: sparse_int(3),
    "sparse-int 8": lambda: sparse_int(8),
    "group-int 3": lambda: made(group_int(3, zero=False)),
    "group-int 4 asymmetric": lambda: made(group_int(4, zero=True)),
    "group-int 8 asymmetric": lambda: made(group_int(8, zero=True)),
    "trit-planes 1": lambda: made(trit_planes(1)),
    "trit-planes 3": lambda: made(trit_planes(3)),
    "partial-binary rows": lambda: made(partial_binary(scattered(0.08), mean=True, zero=True)),
    "partial-binary columns": lambda: made(partial_binary(uneven())),
    "partial-binary bitmap": lambda: made(partial_binary(scattered(0.5), zero=True)),
    "partial-binary inputs": lambda: made(partial_binary(inputs(), by_input=True)),
    "partial-binary none": lambda: made(partial_binary(scattered(-1.0))),
    "partial-binary all": lambda: made(partial_binary(scattered(2.0), zero=True)),
    "scaled-binary": lambda: made(scaled_binary()),
    "low-rank": lambda: made(low_rank(coded=False)),
    "low-rank coded": lambda: made(low_rank(coded=True)),
    "sum": lambda: made(Sum(group_int(4, zero=False, m=6, n=8), low_rank(coded=False, n=8))),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_page_reads_what_the_package_writes(name: str) -> None:
    parts, spec = SAMPLES[name]()
    page = readers()[spec["format"]]
    found = page({part: tensor.numpy() for part, tensor in parts.items()}, spec)
    dtype = parse_dtype(spec["dtype"])
    wanted = format_of(spec).unpack(parts, spec)
    made_by_page = torch.from_numpy(np.ascontiguousarray(found)).to(dtype)
    assert wanted.shape == made_by_page.shape
    assert torch.equal(wanted.view(torch.uint8), made_by_page.view(torch.uint8))


def test_every_format_and_every_code_of_a_mask_has_a_sample() -> None:
    specs = [sample()[1] for sample in SAMPLES.values()]
    assert {spec["format"] for spec in specs} == set(FORMATS)
    masks = {spec["mask"] for spec in specs if spec["format"] == "partial-binary"}
    assert masks == {"none", "all", "inputs", "bitmap", "rows", "columns"}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_page_names_parts_dtypes_and_keys(name: str) -> None:
    """Every part is in the page's table with its dtype, and every key of the spec is on the page."""
    parts, spec = SAMPLES[name]()
    text = (FOLDER / f"{spec['format']}.md").read_text(encoding="utf-8")
    section = text.split("## Parts\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"(?m)^\| `([\w.]+)` \| ([^|]+) \|", section))
    for part, tensor in parts.items():
        nested = next((row for row in rows if row.endswith("...") and part.startswith(row[:-3])), None)
        assert nested or part in rows, f"part {part} is not in the table of {spec['format']}.md"
        if nested is None and rows[part] != "that of the spec":
            assert rows[part] == str(tensor.dtype).removeprefix("torch.")
    assert all(f'"{key}"' in text or f"`{key}`" in text for key in spec)
