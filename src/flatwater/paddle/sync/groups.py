"""With whom a layer shares statistics: what ``process_group=`` and ``timeout=`` may be, checked before any waiting."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any, NamedTuple

from paddle import distributed

from flatwater.errors import DistributedError, InputError

__all__ = ["Sharing", "checked_timeout", "group_of", "world_ranks"]


class Sharing(NamedTuple):
    """With whom, and how long to wait for them.

    Attributes:
        ranks: global ranks, ascending; None for all there are.
        group_id: of Paddle's group of these ranks; None for ranks that were given as numbers.
        timeout: seconds.
    """

    ranks: tuple[int, ...] | None
    group_id: int | None
    timeout: float

    @classmethod
    def of(cls, process_group: Any, timeout: Any) -> Sharing:
        """What the arguments of those names say.

        Raises:
            InputError: they say nothing that could be done.
        """
        return cls(*group_of(process_group), checked_timeout(timeout))


def checked_timeout(timeout: Any) -> float:
    """A number of seconds.

    Raises:
        InputError: it is none, or not positive.
    """
    seconds = 0.0 if type(timeout) is bool or not isinstance(timeout, Real) else float(timeout)
    if not seconds > 0:
        raise InputError(f"timeout={timeout!r} must be a positive number of seconds")
    return seconds


def group_of(process_group: Any) -> tuple[tuple[int, ...] | None, int | None]:
    """The ranks and the number of a group of Paddle's, or of ranks given as numbers, which have none.

    Raises:
        InputError: neither of these; no rank, or one twice; or one that this world has not, where that is known.
    """
    given, group_id = getattr(process_group, "ranks", process_group), getattr(process_group, "id", None)
    if given is None:
        return None, group_id
    wanted = "give different ranks from 0 on, or a group from paddle.distributed.new_group"
    try:
        # Text is iterable too, and its digits would pass for ranks.
        ranks = () if isinstance(given, str | bytes) else tuple(sorted(map(operator.index, given)))
    except TypeError as error:
        raise InputError(f"process_group={process_group!r} is no set of ranks; {wanted}") from error
    if not ranks or ranks[0] < 0 or len(set(ranks)) < len(ranks):
        raise InputError(f"process_group={process_group!r} is no set of ranks; {wanted}")
    if distributed.is_initialized():
        _check_world(ranks)
    return ranks, group_id


def world_ranks(ranks: tuple[int, ...] | None) -> tuple[int, ...]:
    """``ranks``, None being all there are; one rank where there is one, or no process group was initialised.

    Raises:
        InputError: there are not so many ranks.
        DistributedError: this process is not among them.
    """
    if not distributed.is_initialized():
        return (0,)
    size = distributed.get_world_size()
    if ranks is None or size == 1:
        return tuple(range(size))
    _check_world(ranks)
    rank = distributed.get_rank()
    if rank not in ranks:
        raise DistributedError(
            f"rank {rank} shares statistics with ranks {list(ranks)}, to which it does not belong; "
            "give each rank a process_group that it is in"
        )
    return ranks


def _check_world(ranks: tuple[int, ...]) -> None:
    size = distributed.get_world_size()
    if size > 1 and ranks[-1] >= size:
        raise InputError(
            f"process_group={list(ranks)} names rank {ranks[-1]}, but this world has {size} ranks, counted from 0; "
            "give ranks that exist"
        )
