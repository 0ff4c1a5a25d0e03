"""Which norm a layer should have, by what it really normalizes over: one rule of thumb, said once."""

from __future__ import annotations

from typing import Literal, NamedTuple

from flatwater.errors import InputError

__all__ = ["ENOUGH_SAMPLES", "Choice", "choose_norm"]

ENOUGH_SAMPLES = 16
"""Per device. Wu & He (2018, figure 1) see the error of batch norm rise below this."""


class Choice(NamedTuple):
    """A kind of norm, and why."""

    kind: Literal["batch_norm", "sync_batch_norm", "group_norm"]
    reason: str


def choose_norm(samples: int, world_size: int = 1, *, positions: int | None = None) -> Choice:
    """The kind of norm for a layer that gets this much in a training step.

    From 16 samples per device on, batch norm. With fewer, sync batch norm where several devices share statistics,
    and group norm where there is but one. Sync batch norm wants 16 values per channel, too, over all devices.

    Args:
        samples: in the layer's batch on one device; of a detector's head that is regions, not images.
        world_size: how many devices share statistics.
        positions: values per channel of a sample (height × width); None if not known, then taken for many.

    Raises:
        InputError: a number below 1.
    """
    for name, number in (("samples", samples), ("world_size", world_size), ("positions", positions)):
        if number is not None and number < 1:
            raise InputError(f"{name}={number} must be at least 1")
    seen = f"{samples} sample{'s' if samples != 1 else ''} per device"
    if samples >= ENOUGH_SAMPLES:
        return Choice("batch_norm", f"{seen}, at least {ENOUGH_SAMPLES}")
    if world_size == 1:
        return Choice("group_norm", f"{seen}, fewer than {ENOUGH_SAMPLES}, and one device")
    values = samples * world_size * (ENOUGH_SAMPLES if positions is None else positions)
    if values < ENOUGH_SAMPLES:
        return Choice("group_norm", f"{seen}; {values} values per channel on all {world_size} are too few")
    return Choice("sync_batch_norm", f"{seen}, fewer than {ENOUGH_SAMPLES}, but {world_size} devices share")
