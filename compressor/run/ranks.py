"""Ranks of the matrices of a decomposing stage: what a component takes, what the whole may take, what shapes tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor, prod
from typing import Literal

from compressor.engine.skeleton import Linear, Skeleton
from compressor.errors import UserError
from compressor.formats import nbytes
from compressor.methods.decompose_settings import DecomposeSettings, parse_size
from compressor.methods.decomposers import foresee_low_rank
from compressor.methods.ranks import Price, Rank, capped, uniform_ranks
from compressor.run.recipe import Stage
from compressor.run.units import Unit

SURVEYED_TOKENS = 16384
"""Calibration tokens that are sent forwards and backwards through the model in the first round of choosing ranks."""

LATER_TOKENS = 4096
"""As many in each of the rounds that follow."""


MEASURED_RANKS = 64, 128
"""Where what a product takes is measured; up to the larger one a row of the left factor has one scale."""


def settings_of(stage: Stage, linear: Linear) -> DecomposeSettings:
    """The settings of a decomposing stage for one matrix."""
    settings = stage.settings_of(linear.name)
    assert isinstance(settings, DecomposeSettings)
    return settings


def price_of(stage: Stage, linear: Linear) -> Price:
    """What a matrix takes of the stage's budget.

    Of ``keep_params``: parameters; what factors in few bits take, scales included, counts by its share of 16 bits. Of
    ``target_size``: bytes.
    """
    settings = settings_of(stage, linear)
    if settings.target_size is None:
        return parameter_price(settings, linear.shape)
    m, n = linear.shape
    return _price(settings, linear.shape, 1.0, m * n * linear.dtype.itemsize)


def parameter_price(settings: DecomposeSettings, shape: tuple[int, int]) -> Price:
    """What a matrix (m, n) = ``shape`` takes of ``keep_params``."""
    return _price(settings, shape, 0.5, shape[0] * shape[1])


def _price(settings: DecomposeSettings, shape: tuple[int, int], unit: float, whole: float) -> Price:
    """The price for products, whose bytes times ``unit`` are a line through those of two ranks."""
    few, many = (unit * nbytes(foresee_low_rank(settings, shape, "float16", rank)) for rank in MEASURED_RANKS)
    each = (many - few) / (MEASURED_RANKS[1] - MEASURED_RANKS[0])
    return Price(each=each, whole=whole, count=min(shape), fixed=few - MEASURED_RANKS[0] * each)


def budget_of(stage: Stage, linears: Sequence[Linear], skeleton: Skeleton) -> float:
    """What all matrices of a stage may take together, in the unit of `price_of`.

    Raises:
        UserError: a target size that what is not decomposed already exceeds, or that takes no decomposing.
    """
    settings = stage.settings
    assert isinstance(settings, DecomposeSettings)
    weights = sum(prod(linear.shape) for linear in linears)
    if settings.target_size is None:
        return (settings.keep_params or 1.0) * weights
    dense = sum(prod(linear.shape) * linear.dtype.itemsize for linear in linears)
    rest = skeleton.checkpoint.nbytes - dense
    wanted = parse_size(settings.target_size)
    if wanted <= rest:
        raise UserError(
            f"target size {settings.target_size} is less than the {rest / 1e6:.3f} MB of what is not decomposed",
            fix=f"--target-size, more than {rest / 1e6:.3f}MB",
        )
    if wanted >= skeleton.checkpoint.nbytes:
        raise UserError(
            f"target size {settings.target_size} is no less than the {skeleton.checkpoint.nbytes / 1e6:.3f} MB of the "
            "source",
            fix="a smaller --target-size",
        )
    return float(wanted - rest)


def plain_ranks(stage: Stage, linears: Sequence[Linear], skeleton: Skeleton) -> dict[str, Rank]:
    """Ranks as shapes alone give them, by linear name: those of rank N and of uniform ranks; for others an estimate."""
    prices = [price_of(stage, linear) for linear in linears]
    settings = stage.settings
    assert isinstance(settings, DecomposeSettings)
    if settings.residual and settings.rank is not None:
        wanted = [settings_of(stage, linear).rank or settings.rank for linear in linears]
        ranks: list[Rank] = [min(rank, *linear.shape) for rank, linear in zip(wanted, linears, strict=True)]
    elif settings.rank is None:
        ranks = uniform_ranks(prices, budget_of(stage, linears, skeleton))
    else:
        ranks = [
            capped(min(settings_of(stage, linear).rank or settings.rank, *linear.shape), price)
            for linear, price in zip(linears, prices, strict=True)
        ]
    return {linear.name: rank for linear, rank in zip(linears, ranks, strict=True)}


def too_large(stage: Stage, ranks: Mapping[str, Rank], linears: Sequence[Linear]) -> tuple[list[str], list[str]]:
    """What stands against a stage's rank, and what is to be known of it: at that rank a product is no smaller.

    Args:
        ranks: as `plain_ranks` gives them.

    Returns:
        Violations where no matrix would get smaller, and notes where some would.
    """
    settings = stage.settings
    assert isinstance(settings, DecomposeSettings)
    whole = [linear for linear in linears if ranks[linear.name] is None]
    if settings.rank is None or not whole:
        return [], []
    most = {linear.shape: price_of(stage, linear).most for linear in whole}
    told = ", ".join(f"{m} x {n} {f'up to rank {rank}' if rank else 'at none'}" for (m, n), rank in most.items())
    if len(whole) < len(linears):
        some = f"{len(whole)} of {len(linears)} matrices no smaller"
        return [], [f"rank {settings.rank} makes {some}, and these stay whole: it pays for {told}"]
    largest = max(most.values())
    less = f"--rank {largest} at most, or --keep-params 0.8" if largest else "leave these matrices out with --exclude"
    every = f"none of the {len(linears)} matrices" if len(linears) > 1 else "no matrix"
    return [f"rank {settings.rank} makes {every} smaller: it pays for {told}; {less}"], []


def too_small(stage: Stage, linears: Sequence[Linear], skeleton: Skeleton) -> list[str]:
    """What stands against a stage's budget: it leaves less than one component for every matrix."""
    settings = stage.settings
    assert isinstance(settings, DecomposeSettings)
    if settings.rank is not None:
        return []
    try:
        budget = budget_of(stage, linears, skeleton)
    except UserError as error:
        return [str(error)]
    prices = [price_of(stage, linear) for linear in linears]
    least = sum(min(price.of(1), price.whole) for price in prices)
    if least <= budget:
        return []
    share = least / sum(price.whole for price in prices)
    return [f"one component for every matrix takes {share:.1%} of them, more than {settings.budget} allows"]


def rank_note(unit: Unit, rank: Rank) -> str:
    """What was decided for a matrix or stack, in words."""
    full = min(unit.shape)
    together = f", together with {len(unit.members) - 1} more" if len(unit.members) > 1 else ""
    if rank is None:
        return f"stays whole: no rank that would be smaller is worth it ({floor(prod(unit.shape) / sum(unit.shape))})"
    return f"rank {rank} of {full}{together}"


def welore_class(stage: Stage, rank: Rank) -> Literal["LRC", "N-LRC"] | None:
    """A matrix's class by WeLore (arXiv 2407.11239): a low-rank component or not; None where other rules choose."""
    if getattr(stage.settings, "ranks", None) != "welore":
        return None
    return "N-LRC" if rank is None else "LRC"
