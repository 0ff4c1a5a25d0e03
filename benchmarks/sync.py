"""SyncBatchNorm beside BatchNorm in whole training steps, the sums alone, and what a model makes of both.

Each number of ranks is one world of processes on this machine (:mod:`benchmarks.sync_world`), in which all contenders
take turns in every round. Ranks are of one thread each, so that worlds of more ranks than processors measure how these
are shared as well; each row says how many ranks there are to a processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.sync_model import ALGORITHMS, Array, Network, fit, messages, sent_bytes, simulate, step_seconds
from benchmarks.sync_world import World
from benchmarks.timing import Others, Quartiles, rounds

__all__ = [
    "ASSUMED",
    "LENGTHS",
    "PROJECTED",
    "WORLDS",
    "Check",
    "LateSum",
    "Projection",
    "Step",
    "Sum",
    "measure",
    "summary",
]

WORLDS = (2, 4)
LENGTHS = tuple(4**k for k in range(9))
"""Float64 values of the sums that are timed alone."""

LATE_WORLDS = (2, 3, 4, 8)
LATE_LENGTH = 128
LATE = 5e-3
"""Seconds by which messages come later there: so many that how processors are shared counts little."""

PROJECTED = (8, 64, 1024)
"""Numbers of ranks that nobody measured here."""

ASSUMED = Network(latency=25e-6, bandwidth=25e9 / 8)
"""TCP over 25-gigabit Ethernet: an assumption, for comparison with the loopback."""

SHORTEST_PART = 1e-9
"""Seconds: a part of a step that took no time at all would have no logarithm."""


@dataclass(frozen=True)
class Sum:
    """Sums of one length: milliseconds, and how many of ours fit into one of Paddle's."""

    ranks: int
    length: int
    flatwater: Quartiles
    paddle: Quartiles
    ratio: Quartiles


@dataclass(frozen=True)
class Step:
    """One model's training step under DataParallel: milliseconds, and SyncBatchNorm's by BatchNorm's."""

    ranks: int
    model: str
    channels: tuple[int, ...]
    """Of each norm."""
    batch: Quartiles
    sync: Quartiles
    ratio: Quartiles
    in_sums: Quartiles
    """A rank's milliseconds in its 2·L sums, waiting for others included."""
    means: tuple[float, ...]
    """Milliseconds from each sum to the next, over ranks and steps, and their standard deviations."""
    deviations: tuple[float, ...]

    def parts(self) -> tuple[Array, Array]:
        """Mean and deviation of what lies between two sums, in seconds."""
        return np.maximum(np.array(self.means) * 1e-3, SHORTEST_PART), np.array(self.deviations) * 1e-3


@dataclass(frozen=True)
class Check:
    """The model beside a measurement: a rank's milliseconds in the sums of one step."""

    ranks: int
    model: str
    messages: float
    """Predicted, of the sums themselves."""
    waiting: float
    """Predicted, for slower ranks."""
    measured: float

    @property
    def predicted(self) -> float:
        """Both together."""
        return self.messages + self.waiting

    @property
    def ratio(self) -> float:
        """Measured by predicted."""
        return self.measured / self.predicted


@dataclass(frozen=True)
class LateSum:
    """One sum whose messages come late: milliseconds, beside the formula."""

    ranks: int
    messages: int
    """That follow each other, by the formula."""
    delay: float
    """Of each message."""
    predicted: float
    measured: Quartiles

    @property
    def ratio(self) -> float:
        """Measured by predicted."""
        return self.measured.median / self.predicted


@dataclass(frozen=True)
class Projection:
    """What the model says of numbers of ranks that were not measured: milliseconds per training step."""

    ranks: int
    model: str
    step: float
    """BatchNorm's step, measured on the smallest world."""
    waiting: float
    """What waiting for the slowest in every sum adds to waiting once per step."""
    sums: dict[str, dict[str, float]]
    """By network and algorithm."""


def measure(
    *,
    worlds: Sequence[int] = WORLDS,
    lengths: Sequence[int] = LENGTHS,
    late_worlds: Sequence[int] = LATE_WORLDS,
    models: Sequence[str] | None = None,
    network: Network | None = None,
    count: int = 9,
    progress: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Everything, ready for JSON.

    Args:
        worlds: numbers of processes.
        lengths: of the sums that are timed alone.
        late_worlds: numbers of processes whose sums are timed with late messages.
        models: names in :data:`benchmarks.sync_worker.MODELS`; None for all.
        network: the user's, for which the model is asked too.
        count: rounds.
        progress: is told what is being measured.
    """
    sums: list[Sum] = []
    steps: list[Step] = []
    busy = 0.0
    for ranks in worlds:
        progress(f"sync: {ranks} processes")
        with World(ranks, "sync_worker") as world:
            others = Others(*world.pids)
            for length in lengths:
                progress(f"sync: {ranks} processes, sums of {length}")
                world.call("prepare_sums", length=length)
                times = rounds({name: world.timer(name) for name in ("flatwater", "paddle")}, count)
                quartiles = {name: Quartiles.of(time) for name, time in times.items()}
                sums.append(Sum(ranks, length, **quartiles, ratio=Quartiles.of(times["paddle"] / times["flatwater"])))
            for model in world.call("models")[0] if models is None else models:
                progress(f"sync: {ranks} processes, {model}")
                steps.append(_step(world, ranks, model, count))
            busy = max(busy, others.processors())
    late = [_late(ranks, network_of(sums, min(worlds)), count, progress) for ranks in late_worlds]
    return summary(steps, sums, given=network) | {
        "late": [asdict(row) | {"ratio": row.ratio} for row in late],
        "others": busy,
    }


def _late(ranks: int, network: Network, count: int, progress: Callable[[str], object]) -> LateSum:
    progress(f"sync: {ranks} processes, late messages")
    with World(ranks, "sync_worker") as world:
        world.call("prepare_late_sums", length=LATE_LENGTH, seconds=LATE)
        times = rounds({"late": world.timer("late")}, count)["late"]
        delay = float(np.mean(world.call("delay")))
    predicted = messages(ranks) * (delay + network.message(sent_bytes(LATE_LENGTH)) * 1e3)
    return LateSum(ranks, messages(ranks), delay, predicted, Quartiles.of(times))


def summary(steps: Sequence[Step], sums: Sequence[Sum], *, given: Network | None = None) -> dict[str, Any]:
    """What was measured, the network that the sums tell of, and the model beside the steps, ready for JSON.

    Args:
        steps, sums: of each world; that of the fewest ranks gives the model its inputs.
        given: the user's network.
    """
    fewest = min(row.ranks for row in sums)
    networks = {"loopback": network_of(sums, fewest), "assumed": ASSUMED} | ({"given": given} if given else {})
    checks = check(steps, networks["loopback"])
    projections = project([row for row in steps if row.ranks == fewest], networks)
    return {
        "processors": machine.describe()["processors_usable"],
        "sums": [asdict(row) for row in sums],
        "networks": {name: asdict(each) for name, each in networks.items()},
        "steps": [asdict(row) for row in steps],
        "checks": [asdict(row) | {"predicted": row.predicted, "ratio": row.ratio} for row in checks],
        "projections": [asdict(row) for row in projections],
    }


def _step(world: World, ranks: int, model: str, count: int) -> Step:
    channels = world.call("prepare", model=model)[0]
    noted: list[list[dict[str, list[float]]]] = []
    times = rounds({"batch": world.timer("batch"), "sync": world.timer("sync", noted.append)}, count)
    counted = noted[-count:]  # those before are warm-ups
    # Of each round the median step: that now and then the system lets a rank sleep for milliseconds is not modelled.
    in_sums = np.array([np.median(np.mean([answer["in_sums"] for answer in answers], 0)) for answers in counted])
    between = np.concatenate([answer["between"] for answers in counted for answer in answers])
    return Step(
        ranks,
        model,
        tuple(channels),
        Quartiles.of(times["batch"]),
        Quartiles.of(times["sync"]),
        Quartiles.of(times["sync"] / times["batch"]),
        Quartiles.of(in_sums),
        tuple(between.mean(0)),
        tuple(between.std(0)),
    )


def network_of(sums: Sequence[Sum], ranks: int) -> Network:
    """Latency and bandwidth of one message, from our own sums on so many ranks."""
    rows = [row for row in sums if row.ranks == ranks]
    sizes = np.array([sent_bytes(row.length) for row in rows])
    return fit(sizes, np.array([row.flatwater.median * 1e-3 for row in rows]) / messages(ranks))


def check(steps: Sequence[Step], network: Network) -> list[Check]:
    """The model beside every step that was measured: one network for all, and each world's own spread."""
    return [
        Check(
            step.ranks,
            step.model,
            step_seconds(step.channels, step.ranks, network) * 1e3,
            simulate(*step.parts(), step.ranks).waiting * 1e3,
            step.in_sums.median,
        )
        for step in steps
    ]


def project(steps: Sequence[Step], networks: dict[str, Network]) -> list[Projection]:
    """The model for :data:`PROJECTED` ranks that compute as these did."""
    return [
        Projection(
            ranks,
            step.model,
            step.batch.median,
            simulate(*step.parts(), ranks).added * 1e3,
            {
                name: {each: step_seconds(step.channels, ranks, network, each) * 1e3 for each in ALGORITHMS}
                for name, network in networks.items()
            },
        )
        for step in steps
        for ranks in PROJECTED
    ]
