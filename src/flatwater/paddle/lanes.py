"""How float64 vectors travel between processes: gloo connections of Flatwater's own, or the device's group.

Gloo on the CPU is used with care, because of what version 3.3.1 of Paddle makes of it (all measured):

* Where two ranks bring vectors of different lengths to one all-reduce, gloo aborts the process that gets
  more than it expects. So no vector travels over the connections that DataParallel uses, and vectors travel
  by length: each lane has connections of its own. A rank that comes to another lane is awaited, not mixed up.
* An all-reduce cannot be interrupted and gives up after 30 s, whatever was asked for. So it runs in a thread,
  for which the caller waits as long as the caller likes; and a lane that gloo gave up is built anew.
* The store in which ranks find each other takes 44 ms to answer, and its connection must not be shared by
  threads. So it serves to build a lane and to tell faults apart, never in the steady state.
* ``ProcessGroupGloo`` looks for its peers under keys that all its groups share, so that a second group of three
  ranks finds the addresses of the first. The communication context below it has keys of its own: lanes are such
  contexts, and ``paddle.distributed.new_group`` is not needed.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import paddle
from paddle import _C_ops, distributed
from paddle.base import core

from flatwater.errors import DistributedError
from flatwater.kernels import Statistics

__all__ = ["DeviceTransport", "GlooTransport", "Transport", "Worker", "connect_store"]

# Contexts live in one table, by numbers; those of Paddle's own groups are small.
_FIRST_CONTEXT = 1 << 30


class Transport(Protocol):
    """Sums vectors over all ranks; blocks until every rank has come."""

    def sum(self, vector: Statistics) -> Statistics:
        """The sum over the ranks, the same bits on each."""


class Worker:
    """A thread that does one thing after another, so that its user can stop waiting.

    A daemon, unlike those of ``concurrent.futures``: a process whose peer is gone must be able to end.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """Do ``job`` after those before it."""
        future: Future[Any] = Future()
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


def connect_store() -> Any:
    """A connection of the caller's own to the store in which Paddle's ranks find each other.

    Raises:
        DistributedError: the environment does not say where it is.
    """
    host, port = os.getenv("MASTER_ADDR"), os.getenv("MASTER_PORT")
    if not (host and port):
        first = os.getenv("PADDLE_MASTER") or os.getenv("PADDLE_TRAINER_ENDPOINTS", "").split(",")[0]
        host, _, port = first.rpartition(":")
    if not (host and port.isdigit()):
        raise DistributedError(
            f"the rendezvous store is at {host!r}:{port!r}, which is no address; "
            "start the processes with python -m paddle.distributed.launch"
        )
    return core.TCPStore(host, int(port), False, 0)  # not the master, and counted among no number of workers


class GlooTransport:
    """Gloo between ``ranks``, by lanes: one set of connections for each power of two that a length rounds up to.

    Not safe for threads: a communicator uses it from one worker.
    """

    def __init__(self, ranks: tuple[int, ...], rank: int) -> None:
        self._ranks = ranks
        self._index = ranks.index(rank)
        self._store: Any = None
        self._lanes: dict[int, _Lane] = {}
        self._generation = 0

    def sum(self, vector: Statistics) -> Statistics:
        """The sum over the ranks, the same bits on each.

        Raises:
            RuntimeError: what gloo said.
        """
        width = 1 << max(6, (vector.size - 1).bit_length())
        while True:
            lane = self._lanes.get(width) or self._build(width)
            try:
                return lane.sum(vector)
            except RuntimeError as error:
                if "TIMEOUT" not in str(error):
                    raise
                # A rank is late by more than gloo's 30 s. It will find its old connections closed, and come to the
                # new ones too; how long to wait for it is for the user to say.
                self._lanes.clear()
                self._generation += 1

    def _build(self, width: int) -> _Lane:
        self._store = self._store or connect_store()
        identity = f"{self._ranks} {width} {self._generation}"
        number = _FIRST_CONTEXT | zlib.crc32(identity.encode()) >> 2
        core.CommContextManager.create_gloo_comm_context(self._store, str(number), self._index, len(self._ranks))
        self._lanes[width] = _Lane(number, width)
        return self._lanes[width]


class _Lane:
    """Connections for vectors of one length, and the memory that they are sent from."""

    def __init__(self, context: int, width: int) -> None:
        self._context = context
        self._tensor = paddle.zeros([width], "float64")
        memory = (ctypes.c_double * width).from_address(self._tensor.data_ptr())
        self._view = np.ctypeslib.as_array(memory)

    def sum(self, vector: Statistics) -> Statistics:
        self._view[: vector.size] = vector
        self._view[vector.size :] = 0.0
        # Paddle's stubs lack the in-place form.
        _C_ops.all_reduce_(self._tensor, self._context, distributed.ReduceOp.SUM)  # type: ignore[attr-defined]
        return self._view[: vector.size].copy()


class DeviceTransport:
    """The process group of a device (NCCL, BKCL), on its own connections: there, every group takes device memory."""

    def __init__(self, group: Any, place: Any) -> None:
        self._group = group
        self._place = place

    def sum(self, vector: Statistics) -> Statistics:
        """The sum over the ranks, the same bits on each."""
        tensor = paddle.to_tensor(vector, place=self._place)
        self._group.process_group.all_reduce(tensor, core.ReduceOp.SUM, True)
        return np.array(tensor.numpy())
