"""Recursive doubling over real connections, between threads: sums, bits, lengths, strangers, and who is gone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import pytest
from benchmarks.sync_model import messages

from flatwater.errors import DistributedError
from flatwater.paddle.sync import doubling
from flatwater.paddle.sync.doubling import DoublingTransport
from flatwater.paddle.sync.transport import DifferentLengthsError

T = TypeVar("T")


class Store:
    """What ranks need of Paddle's store: ``get`` waits until somebody has ``set``."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self.values[key] = value.encode()
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self.values, timeout=20)
            return self.values[key]


class Rank(DoublingTransport):
    """A transport that a block closes."""

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def store() -> Iterator[Store]:
    found = Store()
    with (
        mock.patch.object(doubling, "connect_store", return_value=found),
        mock.patch.object(doubling, "own_host", return_value="127.0.0.1"),
    ):
        yield found


def pause() -> float:
    """Long enough for a busy machine; a test that waits for it has failed anyway."""
    return 20.0


def on_each(count: int, do: Callable[[int], T]) -> list[T]:
    """What ``do`` returns for each rank, all at the same time."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(do, range(count)))


@pytest.mark.parametrize("count", range(2, 10))
def test_every_rank_gets_the_same_bits_of_the_sum(store: Store, count: int) -> None:
    random = np.random.default_rng(count)
    # More than any socket buffers: each rank has to read while it writes.
    vectors = [[random.standard_normal(size) for size in (1, 7, 200_000)] for _ in range(count)]
    ranks = tuple(range(3, 3 + count))

    def run(index: int) -> list[np.ndarray]:
        with Rank(ranks, ranks[index]) as rank:
            return [rank.sum(vector, pause) for vector in vectors[index]]

    results = on_each(count, run)
    for step in range(3):
        expected = sum(vector[step] for vector in vectors)
        # A sum of ten float64 values in another order: ten roundings at most.
        np.testing.assert_allclose(results[0][step], expected, rtol=0, atol=10 * 2.0**-52 * count)
        for result in results[1:]:
            np.testing.assert_array_equal(result[step], results[0][step])
    assert [vectors[0][0].size, vectors[0][2].size] == [1, 200_000]


@pytest.mark.parametrize("count", range(2, 10))
def test_the_busiest_rank_waits_as_often_as_the_model_says(store: Store, count: int) -> None:
    waits = [0] * count
    swap = doubling._Link.swap

    def run(index: int) -> None:
        def counted(link: doubling._Link, *arguments: Any) -> None:
            waits[index] += 1
            swap(link, *arguments)

        with Rank(tuple(range(count)), index) as rank:
            rank.sum(np.zeros(1), pause)  # connects
            for link in rank._links.values():
                setattr(link, "swap", partial(counted, link))  # noqa: B010 - of this object alone
            rank.sum(np.zeros(1), pause)

    on_each(count, run)
    assert max(waits) == messages(count)


def test_what_was_brought_is_left_as_it_was(store: Store) -> None:
    vectors = [np.ones(3), np.ones(3)]

    def run(index: int) -> None:
        with Rank((0, 1), index) as rank:
            rank.sum(vectors[index], pause)

    on_each(2, run)
    np.testing.assert_array_equal(vectors, np.ones((2, 3)))


@pytest.mark.parametrize("count", [2, 3])
def test_a_longer_vector_is_told_by_its_length(store: Store, count: int) -> None:
    """The last rank comes with more: whoever meets it says so, before the sum is spoilt."""

    def run(index: int) -> str:
        calls = 0

        def impatient() -> float:
            nonlocal calls
            calls += 1
            if calls > 20:
                raise DistributedError("gave up")
            return 0.05

        with Rank(tuple(range(count)), index) as rank:
            rank.sum(np.zeros(1), pause)  # connects, so that only the vectors differ
            try:
                rank.sum(np.zeros(9 if index == count - 1 else 5), impatient)
            except DifferentLengthsError as error:
                return str(error)
            except (DistributedError, ConnectionError):
                return "gave up"
            return "no error"

    said = on_each(count, run)
    assert "9 values where this rank has 5" in said
    assert "no error" not in said


def test_a_closed_connection_names_the_rank(store: Store) -> None:
    def run(index: int) -> str:
        with Rank((4, 6), (4, 6)[index]) as rank:
            rank.sum(np.zeros(2), pause)
            if index == 1:
                return ""
            with pytest.raises(ConnectionError, match="rank 6"):
                rank.sum(np.zeros(2), pause)
            return "seen"

    assert on_each(2, run) == ["seen", ""]


def test_a_connection_is_closed_for_forked_processes_too(store: Store) -> None:
    """What a data loader's worker inherits must not keep the other ranks waiting."""

    def run(index: int) -> str:
        with Rank((0, 1), index) as rank:
            rank.sum(np.zeros(2), pause)
            if index == 1:
                inherited.append(rank._links[0]._connection.dup())
                return ""
            with pytest.raises(ConnectionError, match="rank 1"):
                rank.sum(np.zeros(2), pause)
            return "seen"

    inherited: list[socket.socket] = []
    assert on_each(2, run) == ["seen", ""]
    inherited[0].close()


@pytest.mark.parametrize("greeting", [b"", b"x" * 20, b"x" * 7])
def test_a_stranger_who_connects_takes_no_rank(store: Store, greeting: bytes) -> None:
    key = "flatwater/addresses/0,1/0"

    def run(index: int) -> float:
        if index == 1:
            host, port, _ = store.get(key).decode().split(":")
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(greeting)
        with Rank((0, 1), index) as rank:
            return float(rank.sum(np.ones(1), pause)[0])

    assert on_each(2, run) == [2.0, 2.0]


@pytest.mark.parametrize("index", [0, 1])
def test_who_waits_for_connections_may_give_up(store: Store, index: int) -> None:
    """Of either side: the one that is called, and the one that calls."""

    def give_up() -> float:
        raise DistributedError("enough")

    with pytest.raises(DistributedError, match="enough"):
        DoublingTransport((0, 1), index).sum(np.ones(1), give_up)
