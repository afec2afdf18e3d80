"""Timing calls in turns, so that what the machine does in between does it to all of them."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

Clock = Callable[[], float]
CPU, WALL = time.thread_time, time.perf_counter
"""One thread is timed by the processor time it takes, which others do not add to; several by the clock on the wall."""


@dataclass
class Contender:
    """Something to be timed.

    Attributes:
        facts: what it is; goes into the result.
        once: does it once, and returns the seconds.
        nbytes: that it reads.
    """

    facts: dict[str, Any]
    once: Callable[[], float]
    nbytes: int
    times: list[float | None] = field(default_factory=list)

    def result(self) -> dict[str, Any]:
        """Facts, bytes and seconds of every round, None for those that were left out."""
        times = [None if seconds is None else round(seconds, 9) for seconds in self.times]
        return {**self.facts, "bytes": self.nbytes, "times": times}


def timed(work: Callable[[], object], clock: Clock) -> Callable[[], float]:
    """Return what does ``work`` and returns the seconds that took."""

    def once() -> float:
        began = clock()
        work()
        return clock() - began

    return once


def interleave(contenders: Sequence[Contender], rounds: int, patience: float = math.inf) -> list[dict[str, Any]]:
    """Time each once a round; the next round starts at the next contender.

    Args:
        patience: what takes more seconds is left out of three rounds of four.
    """
    every = [4 if min(each.once(), each.once()) > patience else 1 for each in contenders]
    for turn in range(rounds):
        start = turn % len(contenders)
        for place in (*range(start, len(contenders)), *range(start)):
            each = contenders[place]
            each.times.append(None if turn % every[place] else each.once())
    return [each.result() for each in contenders]


def taken(row: dict[str, Any]) -> list[float]:
    """The seconds of a result, without the rounds that were left out."""
    return [seconds for seconds in row["times"] if seconds is not None]


def quantile(row: dict[str, Any], share: float) -> float:
    """The seconds that ``share`` of a result's calls took less than; 0.5: the median."""
    ordered = sorted(taken(row))
    return float(median(ordered)) if share == 0.5 else ordered[int(share * len(ordered))]


def times_faster(row: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times faster ``row`` is than ``other``: the median over rounds of the ratio within a round."""
    pairs = zip(row["times"], other["times"], strict=True)
    return float(median(theirs / ours for ours, theirs in pairs if ours is not None and theirs is not None))


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Have so many processes compute all the while."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        if count:
            time.sleep(0.5)
        yield
    finally:
        for each in processes:
            each.kill()
            each.wait()
