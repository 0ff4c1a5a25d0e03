"""Which ranks a layer of several shares with, as seen by one of them; no other process is there."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from paddle import distributed

from flatwater.errors import DistributedError, InputError
from flatwater.paddle.sync.collectives import communicator_of
from flatwater.paddle.sync.groups import group_of, world_ranks


class Group(NamedTuple):
    """What is read of a group of Paddle's."""

    ranks: list[int]
    id: int


class Device:
    """A place that this wheel of Paddle's has not."""

    def is_cpu_place(self) -> bool:
        return False


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Rank 1 of three."""
    for name, value in (("is_initialized", True), ("get_world_size", 3), ("get_rank", 1)):
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, (None, None)),
        ([2, 0], ((0, 2), None)),
        (range(3), ((0, 1, 2), None)),
        (Group([1, 2], 7), ((1, 2), 7)),
    ],
)
def test_ranks_are_ascending_and_groups_keep_their_number(given: Any, expected: Any) -> None:
    assert group_of(given) == expected


def test_ranks_have_to_exist_and_to_be_ones_own(world: pytest.MonkeyPatch) -> None:
    assert world_ranks(None) == (0, 1, 2)
    assert world_ranks((0, 1)) == (0, 1)
    assert world_ranks((1,)) == (1,)
    with pytest.raises(InputError, match=r"process_group=\[0, 9\] names rank 9, but this world has 3 ranks"):
        group_of([0, 9])
    with pytest.raises(InputError, match="names rank 3"):  # of a layer that was built before there was a world
        world_ranks((1, 3))
    for others in ((0,), (0, 2)):
        with pytest.raises(DistributedError, match=r"rank 1 shares statistics with ranks .* does not belong"):
            world_ranks(others)


def test_alone_a_process_shares_with_nobody(world: pytest.MonkeyPatch) -> None:
    world.setattr(distributed, "get_world_size", lambda: 1)
    assert world_ranks((0, 1)) == world_ranks(None) == (0,)
    world.setattr(distributed, "is_initialized", lambda: False)
    assert world_ranks((4, 5)) == (0,)


def test_some_ranks_of_a_device_need_a_group_of_paddles(world: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"process_group=\[0, 1\] for tensors at .* must be a group of Paddle's"):
        communicator_of((0, 1), None, Device())
