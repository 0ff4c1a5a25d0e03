"""Sums over ranks on the CPU: recursive doubling over TCP connections of Flatwater's own.

In round k, rank i swaps what it has with rank i xor 2ᵏ, and both add: after log2(p) rounds all p ranks have the
sum, and the same bits, because a + b and b + a are the same. Of other numbers of ranks, those beyond the largest
power of two first hand their vectors to one within, and get the sum from it. That is the algorithm with the
fewest waits, which is what counts for vectors as short as these (Thakur, Rabenseifner and Gropp, Optimization of
Collective Communication Operations in MPICH, 2005).

Gloo's all-reduce, which this replaced, goes around a ring: 2(p - 1) waits (its gloo/allreduce.cc). It also hands
each message from thread to thread, and as Paddle 3.3.1 uses it, it gives up after 30 s whatever was asked for, and
aborts the process that gets a longer vector than it expects. ``docs/sync.md`` has what that cost.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import select
import socket
import weakref
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from flatwater.kernels import Statistics
from flatwater.paddle.sync.rendezvous import connect_store, own_host
from flatwater.paddle.sync.transport import DifferentLengthsError, Pause, Worker, result_of

__all__ = ["DoublingTransport"]

_TOKEN_BYTES = 16
_INDEX_BYTES = 4
# For how many seconds whoever connects may keep the others waiting before saying who it is.
_GREETING = 5.0


class DoublingTransport:
    """Recursive doubling between ``ranks``; connections are made in the first sum.

    Args:
        ranks: global ranks, ascending, two at least.
        rank: of this process.
    """

    def __init__(self, ranks: tuple[int, ...], rank: int) -> None:
        self._ranks = ranks
        self._index = ranks.index(rank)
        self._power = 1 << (len(ranks).bit_length() - 1)
        self._links: dict[int, _Link] = {}

    def sum(self, vector: Statistics, pause: Pause) -> Statistics:
        """See :class:`~flatwater.paddle.sync.transport.Transport`."""
        self._links = self._links or _connect(self._ranks, self._index, self._partners(), pause)
        # Each message begins with the length of its vector.
        own, other = np.empty((2, vector.size + 1))
        own[0], own[1:] = vector.size, vector
        beyond = self._index ^ self._power
        if self._index >= self._power:
            self._links[beyond].swap(_bytes(own), _NOTHING, pause)
            self._receive(beyond, own, pause)
            return own[1:]
        if beyond in self._links:
            self._receive(beyond, other, pause)
            own[1:] += other[1:]
        for partner in self._rounds():
            self._links[partner].swap(_bytes(own), _bytes(other), pause)
            _check(other)
            own[1:] += other[1:]
        if beyond in self._links:
            self._links[beyond].swap(_bytes(own), _NOTHING, pause)
        return own[1:]

    def close(self) -> None:
        """Close the connections: ranks that wait for this one see it."""
        for link in self._links.values():
            link.close()

    def _receive(self, partner: int, into: Statistics, pause: Pause) -> None:
        self._links[partner].swap(_NOTHING, _bytes(into), pause)
        _check(into)

    def _rounds(self) -> list[int]:
        """With whom this rank swaps, if it is within the power of two."""
        return [self._index ^ (1 << k) for k in range(self._power.bit_length() - 1)]

    def _partners(self) -> list[int]:
        beyond = self._index ^ self._power
        if self._index >= self._power:
            return [beyond]
        return self._rounds() + ([beyond] if beyond < len(self._ranks) else [])


_NOTHING = memoryview(b"")


def _bytes(message: Statistics) -> memoryview:
    return message.data.cast("B")


def _check(message: Statistics) -> None:
    if message[0] != message.size - 1:
        raise DifferentLengthsError(f"{message[0]:g} values where this rank has {message.size - 1}")


class _Link:
    """A connection to another rank."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._rank = rank
        self._poll = select.poll()
        _links.add(self)

    def swap(self, message: memoryview, into: memoryview, pause: Pause) -> None:
        """Send ``message`` and fill ``into``, at the same time: neither rank reads only after it has sent.

        Raises:
            ConnectionError: it broke, or the other rank closed it.
        """
        while message or into:
            if message:
                message = message[self._send(message) :]
            if into:
                into = into[self._receive(into) :]
            if message or into:
                self._poll.register(
                    self._connection, (select.POLLOUT if message else 0) | (select.POLLIN if into else 0)
                )
                while not self._poll.poll(1000 * pause()):
                    pass

    def close(self) -> None:
        """Let the other rank see that nothing will come."""
        with contextlib.suppress(OSError):  # it may be broken already
            # Closing alone would tell nobody while a forked process, such as a data loader's, holds it too.
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def forget(self) -> None:
        """Close this process's end of it, of which the process that it was forked from knows nothing."""
        self._connection.close()

    def _send(self, message: memoryview) -> int:
        try:
            return self._connection.send(message)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._broken(error) from error

    def _receive(self, into: memoryview) -> int:
        try:
            count = self._connection.recv_into(into)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._broken(error) from error
        if not count:
            raise ConnectionError(f"rank {self._rank} closed it")
        return count

    def _broken(self, error: OSError) -> ConnectionError:
        return ConnectionError(f"that to rank {self._rank}: {error}")


_links: weakref.WeakSet[_Link] = weakref.WeakSet()


def _forget_links() -> None:
    # A data loader's worker that outlives a killed rank would hold its connections open: nobody would see the death.
    for link in _links:
        link.forget()


os.register_at_fork(after_in_child=_forget_links)


def _connect(ranks: tuple[int, ...], index: int, partners: list[int], pause: Pause) -> dict[int, _Link]:
    """Connections to ``partners``, which are places in ``ranks``: each calls those before it."""
    token = secrets.token_bytes(_TOKEN_BYTES)  # known to those that can read the store
    with socket.create_server((own_host(), 0)) as server:
        directory = _Directory(ranks)
        worker = Worker("flatwater-connect")  # in which the store may keep us waiting
        told = worker.submit(lambda: directory.enter(index, server.getsockname(), token))
        calls: dict[int, Future[socket.socket]] = {
            partner: worker.submit(partial(directory.call, partner, index)) for partner in partners if partner < index
        }
        result_of(told, pause)
        connections: dict[int, socket.socket] = {}
        awaited = {partner for partner in partners if partner > index}
        while awaited:
            caller, connection = _accept(server, token, pause)
            if caller in awaited:
                awaited.remove(caller)
                connections[caller] = connection
            else:
                connection.close()
        connections |= {partner: result_of(call, pause) for partner, call in calls.items()}
    return {partner: _Link(connection, ranks[partner]) for partner, connection in connections.items()}


def _accept(server: socket.socket, token: bytes, pause: Pause) -> tuple[int | None, socket.socket]:
    """Whoever calls next: its place among the ranks, or None if it does not know the token."""
    poll = select.poll()
    poll.register(server, select.POLLIN)
    while not poll.poll(1000 * pause()):
        pass
    connection, _ = server.accept()
    connection.settimeout(_GREETING)
    try:
        greeting = connection.recv(_TOKEN_BYTES + _INDEX_BYTES, socket.MSG_WAITALL)
    except OSError:  # a stranger that says nothing, or is gone
        greeting = b""
    known = hmac.compare_digest(greeting[:_TOKEN_BYTES], token)
    return int.from_bytes(greeting[_TOKEN_BYTES:], "big") if known else None, connection


class _Directory:
    """Where each of ``ranks`` is reached, in the store."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self._key = f"flatwater/addresses/{','.join(map(str, ranks))}"
        self._store: Any = None

    def enter(self, index: int, address: tuple[str, int], token: bytes) -> None:
        self._store = connect_store()
        self._store.set(f"{self._key}/{index}", f"{address[0]}:{address[1]}:{token.hex()}")

    def call(self, partner: int, index: int) -> socket.socket:
        """A connection to ``partner``, once it has entered itself."""
        host, port, token = self._store.get(f"{self._key}/{partner}").decode().rsplit(":", 2)
        connection = socket.create_connection((host, int(port)))
        connection.sendall(bytes.fromhex(token) + index.to_bytes(_INDEX_BYTES, "big"))
        return connection
