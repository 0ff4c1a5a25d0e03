"""Memory that stays: where the tensors that a kernel fills come from.

A training step asks for the same sizes again and again. An allocator that returns large blocks to the system in
between, as the C library's does, pays for each with a page fault per 4 KiB and with zeros that nobody reads. The
pool keeps what is freed for the next tensor of that size, or of half that size at the least; blocks of 2 MiB or more
lie on huge pages where the system has them.

A framework adopts a block through DLPack, and the block returns when the last of its views is gone, from whatever
thread. What lies idle is bounded by :func:`set_limit`, and :func:`trim` gives all of it back.

After ``fork()`` the child has a pool of its own, whole and unlocked whatever the parent's other threads were doing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from flatwater.errors import InputError
from flatwater.kernels import _cpu
from flatwater.kernels.buffer import DTYPES

__all__ = ["PoolStatistics", "empty_capsule", "set_limit", "statistics", "trim"]


class PoolStatistics(NamedTuple):
    """What the pool holds, in bytes, and how often it had what was asked for.

    Attributes:
        in_use: in tensors that are alive, each rounded up by at most an eighth (or 63 bytes).
        idle: held beyond that: kept for the next tensors, or the rest of a block that is larger than its tensor.
        peak: the most that was in use at once since the last :func:`trim`.
        limit: of ``idle``.
        hits: tensors that found an idle block, at most twice their size.
        misses: tensors for which the system was asked.
    """

    in_use: int
    idle: int
    peak: int
    limit: int
    hits: int
    misses: int


def empty_capsule(shape: Sequence[int], dtype: str) -> Any:
    """A dense tensor of the pool, its values undefined, as a DLPack capsule for one consumer.

    Args:
        shape: the dimensions; a tensor of no elements has a block as well.
        dtype: one of :data:`~flatwater.kernels.buffer.DTYPES`.

    Raises:
        InputError: a negative dimension, or another dtype.
        MemoryError: the system has no such block, even after :func:`trim`.
    """
    if dtype not in DTYPES:
        raise InputError(f"no tensors of dtype {dtype!r} in the pool; use one of {', '.join(DTYPES)}")
    if min(shape, default=0) < 0:
        raise InputError(f"a tensor of shape {tuple(shape)} does not exist; give no negative dimension")
    return _cpu.pool_capsule(shape, DTYPES.index(dtype))


def statistics() -> PoolStatistics:
    """What the pool holds now."""
    return PoolStatistics(*_cpu.pool_statistics())


def trim() -> int:
    """Give all idle blocks back, forget the peak, and return how many bytes that was.

    Blocks under 128 KiB go to the C library, which may keep them; larger ones to the system.
    """
    return _cpu.pool_trim()


def set_limit(limit: int | None) -> None:
    """Let at most ``limit`` bytes lie idle; beyond that, what has been idle for longest goes.

    None, as at first, is what makes twice the peak with what is in use: a step finds what the ones before it have
    freed, also where shapes change, and the pool never holds more than twice what the program was seen to need at
    once. 0 keeps nothing.

    Raises:
        InputError: ``limit`` is negative.
    """
    if limit is not None and limit < 0:
        raise InputError(f"limit={limit} is no number of bytes; give 0 or more, or None for the peak")
    _cpu.pool_set_limit(limit)
