"""How float64 vectors travel between processes: gloo connections of Flatwater's own, or the device's group.

Gloo on the CPU is used with care, because of what version 3.3.1 of Paddle makes of it (all measured):

* Where two ranks bring vectors of different lengths to one all-reduce, gloo aborts the process that gets
  more than it expects. So no vector travels over the connections that DataParallel uses, and vectors travel
  by length: each lane has connections of its own. A rank that comes to another lane is awaited, not mixed up.
* An all-reduce cannot be interrupted, and gives up after 30 s whatever was asked for. Where that is soon enough it
  runs in the caller's thread, because another one costs a fraction of a millisecond in each sum; else in a thread
  for which the caller waits as long as the caller likes. Lanes that gloo gave up are built anew.
* The store in which ranks find each other takes 44 ms to answer, and its connection must not be shared by
  threads. So it serves to build a lane and to tell faults apart, never in the steady state.
* ``ProcessGroupGloo`` looks for its peers under keys that all its groups share, so that a second group of three
  ranks finds the addresses of the first: ``paddle.distributed.new_group`` fails on some of them. So each lane is
  built through a store of its own, whose address the first of its ranks puts into that of the world.
"""

from __future__ import annotations

import ctypes
import math
import os
import queue
import socket
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import paddle
from paddle.base import core

from flatwater.errors import DistributedError
from flatwater.kernels import Statistics

__all__ = ["DeviceTransport", "GlooTransport", "Transport", "Worker", "connect_store"]

# All groups live in one table, by numbers; those of Paddle's own are small.
_FIRST_GROUP = 1 << 30
_SUM = core.ReduceOp.SUM


class Transport(Protocol):
    """Sums vectors over all ranks. Not safe for threads: one sum at a time.

    Attributes:
        patience: seconds after which a sum ends by itself, one way or the other.
    """

    patience: float

    def ready(self, size: int) -> bool:
        """Whether a sum of ``size`` values would wait for nothing but the values of the other ranks."""

    def sum(self, vector: Statistics) -> Statistics:
        """The sum over the ranks, the same bits on each.

        Raises:
            RuntimeError: what gloo or the device's library said.
        """

    def may_be_late(self, error: Exception) -> bool:
        """Whether ``error`` may mean that a rank came too late for gloo's patience."""

    def renew(self) -> None:
        """Forget all connections; the next sum makes new ones."""


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
    return _client(*_store_address())


def _store_address() -> tuple[str, int]:
    host, port = os.getenv("MASTER_ADDR"), os.getenv("MASTER_PORT")
    if not (host and port):
        first = os.getenv("PADDLE_MASTER") or os.getenv("PADDLE_TRAINER_ENDPOINTS", "").split(",")[0]
        host, _, port = first.rpartition(":")
    if not (host and port.isdigit()):
        raise DistributedError(
            f"the rendezvous store is at {host!r}:{port!r}, which is no address; "
            "start the processes with python -m paddle.distributed.launch"
        )
    return host, int(port)


def _client(host: str, port: int) -> Any:
    return core.TCPStore(host, port, False, 0)  # not the master, and counted among no number of workers


def _serve_store() -> tuple[Any, str]:
    """A new store, and where the other ranks reach it: at the address from which this host sees theirs."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, socket.socket() as free:
        probe.connect(_store_address())  # sends nothing
        free.bind(("", 0))
        host, port = probe.getsockname()[0], free.getsockname()[1]
    return core.TCPStore(host, port, True, 0), f"{host}:{port}"


class GlooTransport:
    """Gloo between ``ranks``, by lanes: one set of connections for each power of two that a length rounds up to."""

    patience = 30.0

    def __init__(self, ranks: tuple[int, ...], rank: int) -> None:
        self._ranks = ranks
        self._index = ranks.index(rank)
        self._store: Any = None
        self._lanes: dict[int, _Lane] = {}
        self._generation = 0

    def ready(self, size: int) -> bool:
        """Whether the lane is built; until then, a rank waits in the store."""
        return _width(size) in self._lanes

    def sum(self, vector: Statistics) -> Statistics:
        """See :class:`Transport`."""
        width = _width(vector.size)
        lane = self._lanes.get(width)
        if lane is None:
            lane = self._lanes[width] = self._build(width)
        return lane.sum(vector)

    def may_be_late(self, error: Exception) -> bool:
        """Gloo says the same of connections that expired, here or at the other end, and of an ended process."""
        return "TIMEOUT" in str(error)

    def renew(self) -> None:
        """See :class:`Transport`."""
        self._lanes.clear()
        self._generation += 1

    def _build(self, width: int) -> _Lane:
        self._store = self._store or connect_store()
        identity = f"flatwater/lane/{','.join(map(str, self._ranks))}/{width}/{self._generation}"
        if self._index == 0:
            store, address = _serve_store()
            self._store.set(identity, address)
        else:
            host, _, port = self._store.get(identity).decode().rpartition(":")
            store = _client(host, int(port))
        number = _FIRST_GROUP | zlib.crc32(identity.encode()) >> 2
        return _Lane(core.ProcessGroupGloo.create(store, self._index, len(self._ranks), number), store, width)


def _width(size: int) -> int:
    return 1 << max(6, (size - 1).bit_length())


class _Lane:
    """Connections for vectors of one length, and the memory that they are sent from."""

    def __init__(self, group: Any, store: Any, width: int) -> None:
        self._group = group
        self._store = store
        self._tensor = paddle.zeros([width], "float64")
        memory = (ctypes.c_double * width).from_address(self._tensor.data_ptr())
        # By bytes: a ctypes array names its byte order, and the kernels take arrays that do not.
        self._view = np.frombuffer(memoryview(memory).cast("B"), np.float64)

    def sum(self, vector: Statistics) -> Statistics:
        self._view[: vector.size] = vector
        self._view[vector.size :] = 0.0
        self._group.all_reduce(self._tensor, _SUM, True)
        return self._view[: vector.size].copy()


class DeviceTransport:
    """The process group of a device (NCCL, BKCL), on its own connections: there, every group takes device memory."""

    patience = math.inf

    def __init__(self, group: Any, place: Any) -> None:
        self._group = group
        self._place = place

    def ready(self, size: int) -> bool:
        """Always: Paddle built the group."""
        return True

    def sum(self, vector: Statistics) -> Statistics:
        """See :class:`Transport`."""
        tensor = paddle.to_tensor(vector, place=self._place)
        self._group.process_group.all_reduce(tensor, _SUM, True)
        return np.array(tensor.numpy())

    def may_be_late(self, error: Exception) -> bool:
        """Never: Paddle sets how long its groups wait."""
        return False

    def renew(self) -> None:
        """Nothing: the group is Paddle's."""
