"""How far apart two processors are: the time in which a byte goes from one to the other and back.

Threads that share a tensor are slower where their processors do not share a cache, and a virtual machine does not say
whether they do: its host may move them apart, and together again, from one minute to the next. On two processors of an
EPYC (Zen 4) it takes 230 to 290 ns where they share the third-level cache, most of it the interpreter's, and 340 to 500
where they do not (in C 50 to 110 and 320 to 380); a layer of a few megabytes then takes up to three times as long. On
an Intel Xeon, whose processors share one, it takes 320 to 510 ns within an hour (in C mostly 110 to 240).

``python -m benchmarks.round_trip`` measures it, in nanoseconds. A process of its own: it spins, and is alone.
"""

from __future__ import annotations

import math
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["APART", "measure", "round_trip"]

APART = 1.3
"""Times as long as before, and the processors no longer share what they did."""

LONGEST = 10
"""Seconds after which there is no answer: one of the processors belongs to somebody else."""

TRIPS = 1000
"""In one sample, a fraction of a millisecond."""

SAMPLES = 20
"""The shortest of which counts: what interrupts only adds to it."""


def round_trip() -> float:
    """Between the first two processors that this process may use; nan where it has one, or the system cannot say."""
    command = [sys.executable, "-m", "benchmarks.round_trip"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=LONGEST, check=True
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return math.nan
    return float(result.stdout)


def measure(first: int, second: int) -> float:
    """Nanoseconds between two processors, by a byte that two processes share."""
    with mmap.mmap(-1, mmap.PAGESIZE) as shared:
        child = os.fork()
        if child == 0:
            signal.alarm(LONGEST)  # if nobody asks any longer
            os.sched_setaffinity(0, {second})
            _answer(shared)
            os._exit(0)
        os.sched_setaffinity(0, {first})
        try:
            least = math.inf
            for _ in range(SAMPLES):
                start = time.perf_counter_ns()
                _ask(shared)
                least = min(least, (time.perf_counter_ns() - start) / TRIPS)
        finally:
            os.waitpid(child, 0)
    return least


def _ask(shared: mmap.mmap) -> None:
    for trip in range(TRIPS):
        sent = 1 + 2 * (trip % 100)
        shared[0] = sent
        while shared[0] == sent:
            pass


def _answer(shared: mmap.mmap) -> None:
    for _ in range(SAMPLES * TRIPS):
        while not shared[0] % 2:
            pass
        shared[0] += 1


if __name__ == "__main__":
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    print(measure(*usable[:2]) if len(usable) > 1 else math.nan)
