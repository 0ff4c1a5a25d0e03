"""What carries sums of float64 vectors between ranks: the one of a device's group, and what all of them promise."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import paddle
from paddle.base import core

from flatwater.kernels import Statistics

__all__ = ["DeviceTransport", "DifferentLengthsError", "Pause", "Transport", "Worker", "result_of"]

_Result = TypeVar("_Result")

Pause: TypeAlias = Callable[[], float]
"""For how many seconds to wait for another rank before asking again; raises DistributedError to give up."""


class DifferentLengthsError(Exception):
    """Another rank came with a vector of another length."""


class Transport(Protocol):
    """Sums vectors over all ranks. Not safe for threads: one sum at a time, and none after one that failed."""

    def sum(self, vector: Statistics, pause: Pause) -> Statistics:
        """The sum over the ranks, the same bits on each.

        Args:
            vector: what this rank brings.
            pause: asked before each wait for another rank.

        Raises:
            DifferentLengthsError: where the transport can tell.
            OSError, RuntimeError: what the network or the device's library said.
        """

    def close(self) -> None:
        """Sum no more, and let ranks that wait for this one know, where the transport can."""


class Worker:
    """A thread that does one thing after another, so that its user can stop waiting.

    A daemon, unlike those of ``concurrent.futures``: a process whose peer is gone must be able to end.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, job: Callable[[], _Result]) -> Future[_Result]:
        """Do ``job`` after those before it."""
        future: Future[_Result] = Future()
        self._jobs.put((future, job))
        return future

    def _work(self) -> None:
        while True:
            future, job = self._jobs.get()
            try:
                result = job()
            except BaseException as error:  # handed to whoever waits for the result
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, job


def result_of(job: Future[_Result], pause: Pause) -> _Result:
    """What ``job`` returns or raises, unless ``pause`` gives up before."""
    while not wait([job], pause()).done:
        pass
    return job.result()


class DeviceTransport:
    """The process group of a device (NCCL, BKCL), on its own connections: there, every group takes device memory.

    What waits in the device's library cannot be interrupted, so it waits in a thread.
    """

    def __init__(self, group: Any, place: Any) -> None:
        self._group = group
        self._place = place
        self._worker = Worker("flatwater-collective")

    def sum(self, vector: Statistics, pause: Pause) -> Statistics:
        """See :class:`Transport`."""
        return result_of(self._worker.submit(lambda: self._sum(vector)), pause)

    def _sum(self, vector: Statistics) -> Statistics:
        tensor = paddle.to_tensor(vector, place=self._place)
        self._group.process_group.all_reduce(tensor, core.ReduceOp.SUM, True)
        return np.array(tensor.numpy())

    def close(self) -> None:
        """Nothing: the group is Paddle's."""
