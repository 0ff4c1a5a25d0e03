"""What a communicator makes of whatever its transport does, alone in a process and without a store."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from flatwater.errors import DistributedError
from flatwater.kernels import Statistics
from flatwater.paddle.sync.collectives import Communicator, Operation
from flatwater.paddle.sync.transport import DifferentLengthsError, Pause, Transport

OPERATION = Operation("SyncBatchNorm 'a layer'", "forward", 3)


class Imagined(Transport):
    """Another rank, of which a function says what comes of a sum."""

    def __init__(self, add: Callable[[Statistics, Pause], Statistics]) -> None:
        self._add = add
        self.closed = False

    def sum(self, vector: Statistics, pause: Pause) -> Statistics:
        return self._add(vector, pause)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def communicator(monkeypatch: pytest.MonkeyPatch) -> Callable[[Imagined], Communicator]:
    for name in ("MASTER_ADDR", "PADDLE_MASTER", "PADDLE_TRAINER_ENDPOINTS"):
        monkeypatch.delenv(name, raising=False)
    return lambda transport: Communicator((0, 1), 0, transport)


def raising(error: BaseException) -> Imagined:
    def add(vector: Statistics, pause: Pause) -> Statistics:
        raise error

    return Imagined(add)


def waiting(vector: Statistics, pause: Pause) -> Statistics:
    """Wait until told not to."""
    waited = 0
    while pause() >= 0:
        waited += 1
        assert waited < 10**9
    return vector


def test_a_sum_of_equals_comes_back_without_its_marks(communicator: Callable[[Imagined], Communicator]) -> None:
    sums = communicator(Imagined(lambda vector, pause: 2 * vector))
    np.testing.assert_array_equal(sums.sum(np.array([1.0, 2.0]), OPERATION, 1.0), [2.0, 4.0])


@pytest.mark.parametrize(
    ("transport", "said"),
    [
        (raising(ConnectionError("that to rank 1: reset")), "the connection failed (that to rank 1: reset)"),
        (raising(OSError()), "the connection failed (OSError)"),
        (raising(DifferentLengthsError("9 values")), "the ranks came with different things"),
        (Imagined(lambda vector, pause: vector + 1), "the ranks came with different things"),
        (Imagined(waiting), "a rank did not come"),
    ],
    ids=["reset", "without words", "other length", "other marks", "nobody"],
)
def test_a_fault_is_said_once_and_remembered(
    communicator: Callable[[Imagined], Communicator], transport: Imagined, said: str
) -> None:
    sums = communicator(transport)
    with pytest.raises(DistributedError, match="start again from the last checkpoint") as caught:
        sums.sum(np.zeros(2), OPERATION, 0.2)
    assert said in str(caught.value)
    assert "rank 1 cannot be asked: the store, which rank 0 hosts, does not answer" in str(caught.value)
    assert transport.closed  # so that whoever waits for this rank knows
    with pytest.raises(DistributedError, match="cannot run after an earlier fault: forward of"):
        sums.sum(np.zeros(2), OPERATION, 0.2)


@pytest.mark.usefixtures("communicator")  # which leaves no store to ask
def test_that_rank_0_is_gone_is_said_once() -> None:
    sums = Communicator((0, 1, 2, 3), 1, raising(ConnectionError("rank 0 closed it")))
    with pytest.raises(DistributedError) as caught:
        sums.sum(np.zeros(2), OPERATION, 0.2)
    assert (
        "seen: rank 0, which hosts the store, does not answer: it died, or cannot be reached, "
        "so that ranks 2, 3 cannot be asked; let every rank"
    ) in str(caught.value)


def test_an_interrupted_sum_is_the_last(communicator: Callable[[Imagined], Communicator]) -> None:
    transport = raising(KeyboardInterrupt())
    sums = communicator(transport)
    with pytest.raises(KeyboardInterrupt):
        sums.sum(np.zeros(2), OPERATION, 60.0)
    assert transport.closed
    with pytest.raises(DistributedError, match="was interrupted by KeyboardInterrupt"):
        sums.sum(np.zeros(2), OPERATION, 60.0)
