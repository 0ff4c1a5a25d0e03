"""The one collective of synchronised batch norm: a checked sum over ranks that ends in a result or in an error.

Every vector carries four numbers more: two halves of a check value of what is being summed (layer, direction,
channels, how many sums went before), and their squares. Over n ranks Σv = n·v and Σv² = n·v² hold only where all
v are equal, so that a rank which is somewhere else is found in the very sum that it would have spoilt.

What the ranks were at is exchanged through the store, after a second without an answer and after a fault only.
"""

from __future__ import annotations

import time
import zlib
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
from paddle import distributed

from flatwater.errors import DistributedError
from flatwater.kernels import Statistics
from flatwater.paddle.lanes import DeviceTransport, GlooTransport, Transport, Worker
from flatwater.paddle.reports import Report, Reports

__all__ = ["Communicator", "Direction", "Operation", "communicator_of", "group_of", "world_ranks"]

Direction = Literal["forward", "backward", "average"]

# How long a rank waits before it asks where the others are, and how often it asks again.
_PATIENCE = 1.0


@dataclass(frozen=True)
class Operation:
    """What a sum is for: the same on every rank, or something is wrong.

    Attributes:
        layer: how the layer is called in messages.
        direction: of which half of a training step the sum is, or that of moving statistics.
        channels: of the layer.
        detail: what else has to be the same.
    """

    layer: str
    direction: Direction
    channels: int
    detail: str = ""

    def __str__(self) -> str:
        detail = f", {self.detail}" if self.detail else ""
        return f"{self.direction} of {self.layer} ({self.channels} channels{detail})"


class Communicator:
    """Sums over a fixed set of ranks, made once per process and set of ranks.

    Args:
        ranks: global ranks, ascending.
        rank: of this process.
    """

    def __init__(self, ranks: tuple[int, ...], rank: int, transport: Transport) -> None:
        self.ranks = ranks
        self.rank = rank
        self._transport = transport
        self._worker = Worker("flatwater-collective")
        self._reports = Reports(ranks, rank)
        self._calls = 0
        self._renewed = 0
        self._failure: str | None = None

    def sum(self, values: Statistics, operation: Operation, timeout: float) -> Statistics:
        """The sum of ``values`` over the ranks, by one all-reduce of ``len(values) + 4`` numbers, padded.

        Args:
            operation: what the values are for; compared between the ranks.
            timeout: seconds after which ranks that have not come are given up.

        Raises:
            DistributedError: a rank died, did not come in time, or came with something else. Every later sum
                of this communicator raises it too: what the other ranks hold is no longer known.
        """
        if self._failure is not None:
            raise DistributedError(
                f"{operation} on rank {self.rank} cannot run after an earlier fault: {self._failure}"
            )
        self._calls += 1
        marks = _marks(operation, self._calls)
        vector = np.concatenate([marks, values])
        started = time.monotonic()
        total = self._sum(vector, operation, started, timeout)
        if not np.array_equal(total[: marks.size], marks * len(self.ranks)):
            self._fail(operation, started, "the ranks came with different things")
        return total[marks.size :]

    def _sum(self, vector: Statistics, operation: Operation, started: float, timeout: float) -> Statistics:
        transport = self._transport
        while True:
            left = started + timeout - time.monotonic()
            try:
                if left > transport.patience and transport.ready(vector.size):
                    return transport.sum(vector)
                return self._await(self._worker.submit(lambda: transport.sum(vector)), operation, started, timeout)
            except DistributedError:
                raise
            except Exception as error:  # whatever gloo or the device's library raises
                if not self._renew(error, operation, started):
                    self._fail(operation, started, f"the connection failed ({str(error).splitlines()[0]})")

    def _await(self, job: Future[Statistics], operation: Operation, started: float, timeout: float) -> Statistics:
        while True:
            left = started + timeout - time.monotonic()
            done, _ = wait([job], max(0.0, min(_PATIENCE, left)))
            if done:
                return job.result()
            if left <= _PATIENCE:
                self._fail(operation, started, f"not every rank came within timeout={timeout:g} s")
            report = Report(self.rank, self._calls, str(operation), self._renewed == self._calls)
            self._reports.publish(report)
            if self._reports.contradict(report):
                self._fail(operation, started, "the ranks are not at the same thing")

    def _renew(self, error: Exception, operation: Operation, started: float) -> bool:
        """Get new connections, if the old ones expired while a rank waited: this one, or one that waits for it."""
        if not self._transport.may_be_late(error):
            return False
        report = Report(self.rank, self._calls, str(operation), renewing=True)
        if time.monotonic() - started < self._transport.patience and not self._reports.invite(report):
            return False
        self._transport.renew()
        self._renewed = self._calls
        self._reports.publish(report)
        return True

    def _fail(self, operation: Operation, started: float, what: str) -> NoReturn:
        waited = time.monotonic() - started
        report = Report(self.rank, self._calls, str(operation), fault=what)
        self._reports.publish(report)
        self._failure = (
            f"{operation}, sum {self._calls} of rank {self.rank} in ranks {list(self.ranks)}: {what}, "
            f"after {waited:.1f} s; seen: {self._reports.collect(report)}; let every rank run the same layers in the "
            "same order, and start again from the last checkpoint"
        )
        raise DistributedError(self._failure)


def _marks(operation: Operation, call: int) -> Statistics:
    """Two 16-bit halves of a check value and their squares: sums of them over 2²⁰ ranks are exact."""
    code = zlib.crc32(f"{call} {operation}".encode())
    high, low = code >> 16, code & 0xFFFF
    return np.array([high, low, high * high, low * low], np.float64)


_communicators: dict[tuple[Any, ...], Communicator] = {}


def group_of(process_group: Any) -> tuple[tuple[int, ...] | None, int | None]:
    """The ranks and the number of a group of Paddle's, or of ranks given as numbers, which have none."""
    ranks = getattr(process_group, "ranks", process_group)
    return None if ranks is None else tuple(sorted(map(int, ranks))), getattr(process_group, "id", None)


def world_ranks(ranks: tuple[int, ...] | None) -> tuple[int, ...]:
    """``ranks``, None being all there are; one rank where no process group was initialised."""
    if not distributed.is_initialized():
        return (0,)
    return tuple(range(distributed.get_world_size())) if ranks is None else ranks


def communicator_of(ranks: tuple[int, ...], group_id: int | None, place: Any) -> Communicator:
    """The communicator of these ranks for tensors at ``place``.

    Args:
        group_id: of Paddle's group of these ranks, which devices other than the CPU use; None for that of all.

    Raises:
        DistributedError: this process is not among the ranks.
    """
    on_cpu = place.is_cpu_place()
    key = (ranks, None if on_cpu else (group_id, str(place)))
    found = _communicators.get(key)
    if found is None:
        rank = distributed.get_rank()
        if rank not in ranks:
            raise DistributedError(
                f"rank {rank} runs a SyncBatchNorm of ranks {list(ranks)}; give each rank a process_group that it is in"
            )
        transport: Transport = (
            GlooTransport(ranks, rank) if on_cpu else DeviceTransport(distributed.get_group(group_id or 0), place)
        )
        found = _communicators[key] = Communicator(ranks, rank, transport)
    return found
