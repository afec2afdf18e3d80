"""Which tile a kernel works with: a small table by shape and number of tokens, in place of tuning at run time."""

from __future__ import annotations

from dataclasses import dataclass

MULTIPROCESSORS = 132
"""Of an H100 or H200, for which the table is made; elsewhere it is near enough."""

GEMV_TOKENS = 2
"""Up to so many tokens, products of four bytes; above, tensor cores, which take 8 tokens for the same instructions."""

FUSED_WEIGHTS = 1 << 24
"""Up to so many weights a program rounds the activations for itself: 80 % more instructions, which cost less than
the microsecond or more of another launch. Reckoned from instructions and bandwidth of an H200, not measured."""

GEMM_TOKENS = 64
"""Up to so many tokens the codes are multiplied; above, the matrix is unpacked and multiplied by the library's gemm."""

SIGNS_TOKENS = 4
"""The same for signs with salient weights, whose kernel reads them anew for each token."""


@dataclass(frozen=True)
class Tile:
    """How the work of one product is cut.

    Attributes:
        rows: outputs of a program.
        words: words of a row that a program of the kernel for few tokens takes at a step; the others take a block.
        warps: of a program.
        stages: how many steps ahead weights are loaded.
        splits: programs that share the inputs of the same outputs; their sums are added afterwards, in order.
    """

    rows: int
    words: int
    warps: int
    stages: int
    splits: int


def gemv_tile(m: int, words: int) -> Tile:
    """Return the tile for few tokens: ``m`` outputs, ``words`` 32-bit words a row and plane.

    A thread takes the same four words (16 bytes) of all rows of its program, so that it loads its activations once for
    all of them: ``words`` is 128 a warp. Steps are as wide as leaves the least of the last one empty.
    """
    wide = min((512, 256, 128), key=lambda step: -(-words // step) * step)
    rows = 8 if m >= 8 * 2 * MULTIPROCESSORS else 4
    splits = max(1, min(2 * MULTIPROCESSORS // -(-m // rows), words // wide))
    return Tile(rows, wide, wide // 128, 1, splits)


def fused_tile(m: int, words: int) -> Tile:
    """Return the tile where every program rounds the activations for itself: rows share that work."""
    tile = gemv_tile(m, words)
    return Tile(tile.rows, tile.words, tile.warps, 1, 1)


def signs_tile(m: int, words: int, exact: bool) -> Tile:
    """Return the tile for signs with salient weights; in exact mode a thread holds the activations of 128 inputs."""
    if exact:
        return Tile(4, 128, 1, 1, 1)
    wide = 256 if words > 128 else 128
    return Tile(4 if m < 4 * 8 * MULTIPROCESSORS else 8, wide, wide // 128, 1, 1)


def gemm_tile(m: int, blocks: int, tokens: int) -> Tile:
    """Return the tile for tensor cores: ``m`` outputs, ``blocks`` a row, ``tokens`` tokens.

    With two warps Triton takes the tensor cores' older instruction, which costs fewer instructions around it at up to
    32 tokens; above, two warps have too few registers.
    """
    rows = 64
    splits = max(1, min(4 * MULTIPROCESSORS // -(-m // rows), blocks // 4))
    return Tile(rows, 0, 2 if tokens <= 32 else 4, 3, splits)


def token_columns(tokens: int) -> int:
    """Return how many tokens a program for tensor cores takes: 8, 16, 32 or 64."""
    return next(columns for columns in (8, 16, 32, 64) if tokens <= columns or columns == 64)
