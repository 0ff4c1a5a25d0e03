"""Whole training steps as a user starts them, under ``flatwater run``, and there with Flatwater's layers.

The first is the environment without any variable that Flatwater would set, the second the one with all of them; the
code is the same. Each has a process of its own (:mod:`benchmarks.host_worker`), and all take turns in every round.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import machine
from benchmarks.round_trip import round_trip
from benchmarks.timing import Others, Quartiles, Times, rounds
from benchmarks.worker import Worker

__all__ = ["GOAL", "Row", "measure", "row_of"]

GOAL = 2.0
"""How many times as fast stock Paddle's training steps are to be under ``flatwater run``, with no change of code."""


@dataclass(frozen=True)
class Row:
    """One model; milliseconds of a training step, and how many times as fast as stock Paddle's untuned ones."""

    model: str
    default: Quartiles
    tuned: Quartiles
    flatwater: Quartiles
    tuned_speedup: Quartiles
    flatwater_speedup: Quartiles

    @property
    def holds(self) -> bool:
        """Whether tuning alone reaches the goal."""
        return self.tuned_speedup.median >= GOAL


def measure(*, count: int = 5, progress: Callable[[str], object] = print) -> dict[str, Any]:
    """Every row, ready for JSON.

    Args:
        count: rounds.
        progress: is told what is being measured.
    """
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker("host_worker", make())) for name, make in machine.ENVIRONMENTS.items()
        }
        others = Others(*(worker.pid for worker in workers.values()))
        rows, trips = [], [round_trip()]
        for model in workers["tuned"].call("models"):
            progress(f"host: {model}")
            for worker in workers.values():
                worker.call("prepare", model=model)
            timers = {
                "default": workers["default"].timer("stock"),
                "tuned": workers["tuned"].timer("stock"),
                "flatwater": workers["tuned"].timer("flatwater"),
            }
            rows.append(row_of(model, rounds(timers, count)))
            trips.append(round_trip())
        busy = others.processors()
    return {"rows": [asdict(row) | {"holds": row.holds} for row in rows], "others": busy, "round_trips": trips}


def row_of(model: str, times: dict[str, Times]) -> Row:
    """The row of one model, from the times of ``default``, ``tuned`` and ``flatwater``."""
    return Row(
        model,
        **{name: Quartiles.of(times[name]) for name in ("default", "tuned", "flatwater")},
        tuned_speedup=Quartiles.of(times["default"] / times["tuned"]),
        flatwater_speedup=Quartiles.of(times["default"] / times["flatwater"]),
    )
