"""Timing calls in turns, so that what the machine does in between does it to all of them."""

from __future__ import annotations

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
    times: list[float] = field(default_factory=list)

    def result(self) -> dict[str, Any]:
        """Facts, bytes and seconds of every round."""
        return {**self.facts, "bytes": self.nbytes, "times": [round(seconds, 9) for seconds in self.times]}


def timed(work: Callable[[], object], clock: Clock) -> Callable[[], float]:
    """Return what does ``work`` and returns the seconds that took."""

    def once() -> float:
        began = clock()
        work()
        return clock() - began

    return once


def interleave(contenders: Sequence[Contender], rounds: int) -> list[dict[str, Any]]:
    """Time each once a round, after two rounds that do not count; the next round starts at the next contender."""
    for each in contenders:
        each.once()
        each.once()
    for turn in range(rounds):
        start = turn % len(contenders)
        for each in (*contenders[start:], *contenders[:start]):
            each.times.append(each.once())
    return [each.result() for each in contenders]


def quantile(times: Sequence[float], share: float) -> float:
    """The value below which ``share`` of ``times`` lie."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def times_faster(row: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times faster ``row`` is than ``other``: the median over rounds of the ratio within a round."""
    return median(theirs / ours for ours, theirs in zip(row["times"], other["times"], strict=True))


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
