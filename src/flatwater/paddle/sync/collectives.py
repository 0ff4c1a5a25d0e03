"""The one collective of synchronised batch norm: a checked sum over ranks that ends in a result or in an error.

Every vector carries four numbers more: two halves of a check value of what is being summed (layer, direction,
channels, how many sums went before), and their squares. Over n ranks Σv = n·v and Σv² = n·v² hold only where all
v are equal, so that a rank which is somewhere else is found in the very sum that it would have spoilt.

What the ranks were at is exchanged through the store, after a second without an answer and after a fault only.
"""

from __future__ import annotations

import threading
import time
import zlib
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import numpy as np
from paddle import distributed

from flatwater.errors import DistributedError, InputError
from flatwater.kernels import Statistics
from flatwater.paddle.sync.doubling import DoublingTransport
from flatwater.paddle.sync.reports import Report, Reports
from flatwater.paddle.sync.transport import DeviceTransport, DifferentLengthsError, Transport

__all__ = ["Communicator", "Direction", "Operation", "communicator_of"]

Direction = Literal["forward", "backward", "average", "exchange"]

# How long a rank waits before it asks where the others are, and how often it asks again.
_PATIENCE = 1.0
# For how long a rank that knows of a fault asks the others what they saw.
_TESTIMONY = 4.0

# Instead of the operation's own advice, where the ranks differ in nothing else.
_EQUALIZE = (
    "their moving statistics differ, as plain batch norm leaves them under DataParallel: start all ranks again, "
    "and call fw.average_statistics(model) on each before fw.convert_sync_batchnorm(model), or load one checkpoint"
)


@dataclass(frozen=True)
class Operation:
    """What a sum is for: the same on every rank, or something is wrong.

    Attributes:
        subject: how the layer is called in messages, or whatever else the numbers are of.
        direction: of which half of a training step the sum is, or that of moving statistics, or of other numbers.
        size: channels of the layer, or how many numbers.
        detail: what else has to be the same.
        statistics: a check value of the moving statistics, which have to be the same as well.
        advice: what to do if it fails.
    """

    subject: str
    direction: Direction
    size: int
    detail: str = ""
    statistics: str = ""
    advice: str = (
        "let every rank run the same layers, with the same settings and in the same order, "
        "and start again from the last checkpoint"
    )

    def __str__(self) -> str:
        unit = ("number" if self.direction == "exchange" else "channel") + ("s" if self.size != 1 else "")
        details = "".join(f", {detail}" for detail in (self.detail, self.statistics) if detail)
        return f"{self.direction} of {self.subject} ({self.size} {unit}{details})"

    @property
    def without_statistics(self) -> str:
        """The same as text, whatever the moving statistics are."""
        return str(replace(self, statistics=""))


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
        self._reports = Reports(ranks, rank)
        self._calls = 0
        self._pending: _Attempt | None = None
        self._speaking = threading.Lock()  # held so that nothing is said of a sum after that it has failed
        threading.Thread(target=self._watch, name="flatwater-watch", daemon=True).start()
        self._failure: str | None = None

    def sum(self, values: Statistics, operation: Operation, timeout: float) -> Statistics:
        """The sum of ``values`` over the ranks, by one all-reduce of ``len(values) + 4`` numbers.

        Args:
            operation: what the values are for; compared between the ranks.
            timeout: seconds after which ranks that have not come are given up.

        Raises:
            DistributedError: a rank died, did not come in time, or came with something else. Every later sum
                of this communicator raises it too: what the other ranks hold is no longer known.
        """
        if self._failure is not None:
            raise DistributedError(
                f"{operation} on rank {self.rank} cannot run after an earlier fault: {self._failure}; "
                "nothing is shared with these ranks any more: start all of them again"
            )
        self._calls += 1
        attempt = self._pending = _Attempt(self._calls, operation, timeout)
        marks = _marks(attempt)
        total = self._sum(np.concatenate([marks, values]), attempt)
        self._pending = None
        if not (total[: marks.size] == marks * len(self.ranks)).all():
            self._fail(attempt, "the ranks came with different things")
        return total[marks.size :]

    def _sum(self, vector: Statistics, attempt: _Attempt) -> Statistics:
        try:
            return self._transport.sum(vector, lambda: self._pause(attempt))
        except DistributedError:
            raise
        except DifferentLengthsError:
            self._fail(attempt, "the ranks came with different things")
        except Exception as error:  # whatever the network or the device's library raises
            self._fail(attempt, f"the connection failed ({next(iter(str(error).splitlines()), type(error).__name__)})")
        except BaseException as error:  # the user's Ctrl-C: half a message may be on its way
            self._failure = f"{attempt.operation} was interrupted by {type(error).__name__}"
            self._transport.close()
            raise

    def _pause(self, attempt: _Attempt) -> float:
        """For how many seconds to wait, if at all."""
        left = attempt.left()
        if left <= 0:
            self._fail(attempt, "a rank did not come")
        if attempt.waited() >= _PATIENCE and self._reports.contradict(self._report(attempt)):
            self._fail(attempt, "the ranks are not at the same thing")
        return min(_PATIENCE, left)

    def _fail(self, attempt: _Attempt, what: str) -> NoReturn:
        with self._speaking:
            self._pending = None
        fault = f"{what}, after {attempt.waited():.1f} s of timeout={attempt.timeout:g} s"
        report = self._report(attempt, fault)
        self._reports.publish(report)
        seen = self._reports.collect(report, attempt.time_for_testimony())
        advice = _EQUALIZE if self._reports.differ_in_statistics(report) else attempt.operation.advice
        self._failure = (
            f"{attempt.operation}, sum {attempt.call} of rank {self.rank} in ranks {list(self.ranks)}: {fault}; "
            f"seen: {seen}; {advice}"
        )
        self._transport.close()  # last: whoever sees it asks what this rank has said
        raise DistributedError(self._failure)

    def _watch(self) -> None:
        """Let the others know of a sum that takes long, and read what they say: the store may not be there later."""
        while True:
            time.sleep(_PATIENCE / 2)
            with self._speaking:
                attempt = self._pending
                if attempt is not None and attempt.waited() > _PATIENCE:
                    self._reports.publish(self._report(attempt))
                    self._reports.refresh()

    def _report(self, attempt: _Attempt, fault: str | None = None) -> Report:
        operation = attempt.operation
        return Report(self.rank, attempt.call, str(operation), operation.without_statistics, fault)


class _Attempt:
    """One sum that is being waited for, and the time that is left for it."""

    def __init__(self, call: int, operation: Operation, timeout: float) -> None:
        self.call = call
        self.operation = operation
        self.timeout = timeout
        self._started = time.monotonic()

    def waited(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._started

    def left(self) -> float:
        """Seconds for which it may still wait: so long that there is time to say why it failed."""
        return self.timeout - min(_TESTIMONY, self.timeout / 4) - self.waited()

    def time_for_testimony(self) -> float:
        """Seconds for which the others may be asked what they saw."""
        return max(min(_TESTIMONY, self.timeout / 4), min(_TESTIMONY, self.timeout - self.waited()))


def _marks(attempt: _Attempt) -> Statistics:
    """Two 16-bit halves of a check value and their squares: sums of them over 2²⁰ ranks are exact."""
    code = zlib.crc32(f"{attempt.call} {attempt.operation}".encode())
    high, low = code >> 16, code & 0xFFFF
    return np.array([high, low, high * high, low * low], np.float64)


_communicators: dict[tuple[Any, ...], Communicator] = {}


def communicator_of(ranks: tuple[int, ...], group_id: int | None, place: Any) -> Communicator:
    """The communicator of these ranks for tensors at ``place``.

    Args:
        group_id: of Paddle's group of these ranks, which devices other than the CPU use; None for that of all.

    Raises:
        InputError: a device, where some of the ranks share, without a group of Paddle's.
    """
    on_cpu = place.is_cpu_place()
    key = (ranks, None if on_cpu else (group_id, str(place)))
    found = _communicators.get(key)
    if found is None:
        rank = distributed.get_rank()
        if not on_cpu and group_id is None and ranks != tuple(range(distributed.get_world_size())):
            # Paddle's group of all ranks would sum over all of them.
            raise InputError(
                f"process_group={list(ranks)} for tensors at {place} must be a group of Paddle's there; "
                "give what paddle.distributed.new_group returns"
            )
        transport: Transport = (
            DoublingTransport(ranks, rank) if on_cpu else DeviceTransport(distributed.get_group(group_id or 0), place)
        )
        found = _communicators[key] = Communicator(ranks, rank, transport)
    return found
