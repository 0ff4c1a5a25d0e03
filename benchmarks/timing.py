"""Times that can be compared: paired rounds, medians and quartiles, and who else was computing.

Each round takes one sample of every contender, beginning with another one each, so that what disturbs the machine
disturbs all of them. Ratios are taken within a round, and their median is reported: a slow minute cancels.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = [
    "FEW_FAULTS",
    "QUIET",
    "Others",
    "Quartiles",
    "Times",
    "geometric_mean",
    "page_faults",
    "rounds",
    "settle",
    "timer",
]

Times = npt.NDArray[np.float64]
"""Milliseconds, one per round."""

Timer = Callable[[int], float]
"""Milliseconds that one step takes, averaged over so many, after some that are not counted."""

SHORTEST_SAMPLE = 20.0
"""Milliseconds: long enough that one interruption is not all there is."""

FEW_FAULTS = 8
"""Page faults per step that count as none: 4 KiB each, where a tensor of 25 MB has six thousand."""

MOST_TO_SETTLE = 12
"""Steps that one contender is given for it."""

QUIET = 0.1
"""Processors that others may keep busy before the figures say more about them than about what was measured."""


@dataclass(frozen=True)
class Quartiles:
    """Of one number per round; nan where fewer than half of the rounds have one."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Times) -> Quartiles:
        """Those of ``values``, one per round; nan is no value."""
        known = values[~np.isnan(values)]
        if 2 * known.size < values.size:
            return cls(math.nan, math.nan, math.nan)
        return cls(*(float(value) for value in np.percentile(known, [25, 50, 75])))


def timer(step: Callable[[], object]) -> Timer:
    """How to time ``step`` in this process."""

    def milliseconds(repeats: int) -> float:
        for _ in range(1 + repeats // 8):  # whatever ran before has the caches, and this one's threads may be asleep
            step()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats * 1e3

    return milliseconds


def settle(steps: Collection[Callable[[], object]]) -> None:
    """Take each of the steps until it costs as many page faults as the time before, and all of them once more so.

    What a process allocates grows its heap for a while: a block in which something small has been put in the meantime
    does not fit the next tensor. A step that meets fresh memory was seen to take four times as long.
    """
    for _ in range(2):
        for step in steps:
            before = -1
            for _ in range(MOST_TO_SETTLE):
                faults = page_faults()
                step()
                taken = page_faults() - faults
                if before >= 0 and abs(taken - before) < FEW_FAULTS:
                    break
                before = taken


def rounds(timers: Mapping[str, Timer], count: int) -> dict[str, Times]:
    """One sample per round and contender, each of :data:`SHORTEST_SAMPLE` or one step, whichever is longer."""
    repeats = {}
    for name, sample in timers.items():
        sample(1)  # allocations, pages, threads
        repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / sample(1)))
    names, times = list(timers), {name: np.zeros(count) for name in timers}
    for index in range(count):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            times[name][index] = timers[name](repeats[name])
    return times


def geometric_mean(ratios: Iterable[float]) -> float:
    """exp(mean(log r)), under which a ratio and its inverse cancel; nan is left out, and nan of no ratios."""
    logarithms = [math.log(ratio) for ratio in ratios if not math.isnan(ratio)]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else math.nan


class Others:
    """How many processors everything but these processes has kept busy since this was made.

    What a hypervisor gave to other machines while this one had work for it counts. Known on Linux; elsewhere nan.

    Args:
        processes: those that measure, besides this one; they must outlive this object.
    """

    def __init__(self, *processes: int) -> None:
        self._processes = processes
        self._began, self._busy_before, self._own_before = time.perf_counter(), _busy(), self._own()

    def processors(self) -> float:
        """Since this was made."""
        others = (_busy() - self._busy_before) - (self._own() - self._own_before)
        return max(0.0, others / (time.perf_counter() - self._began))

    def _own(self) -> float:
        return time.process_time() + sum(map(_process_time, self._processes))


def page_faults() -> int:
    """How many this process has had that took no reading from a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _busy() -> float:
    """Seconds that all processors have spent on all processes, or on other virtual machines when wanted here."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split()
    except FileNotFoundError:
        return math.nan
    return _seconds([*fields[1:4], fields[8]])  # user, nice, system; steal


def _process_time(process: int) -> float:
    # The name of the program stands in parentheses and may hold blanks; user and system time are fields 14 and 15.
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return _seconds(fields[11:13])


def _seconds(ticks: list[str]) -> float:
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
