"""How the momentum of batch norm's moving statistics goes over a training."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from flatwater.errors import InputError

__all__ = ["Curve", "MomentumCurve", "Unit"]

Curve: TypeAlias = Literal["linear", "cosine", "constant"]
Unit: TypeAlias = Literal["step", "epoch"]


@dataclass(frozen=True)
class MomentumCurve:
    """The momentum at each step or epoch: the share of the OLD statistics kept, given at some and followed between.

    From p, with momentum a, to the next place q, with momentum b, at t = (x - p)/(q - p):

    ============  ==========================================
    ``linear``    a + (b - a)·t
    ``cosine``    a + (b - a)·(1 - cos πt)/2
    ``constant``  a, until the next place is reached
    ============  ==========================================

    Before the first place and behind the last, it is what it is there.

    Attributes:
        at: momentum by step or epoch, counted from 0.
        curve: how it goes between.
        by: what the places count.

    Raises:
        InputError: no places, one that is no whole number from 0 on, a momentum outside 0 to 1, another curve or unit.
    """

    at: Mapping[int, float]
    curve: Curve = "linear"
    by: Unit = "step"

    def __post_init__(self) -> None:
        if not self.at:
            raise InputError("at={} says no momentum; give one by step or epoch, such as {0: 0.5, 1000: 0.99}")
        for place, momentum in self.at.items():
            if not isinstance(place, int) or isinstance(place, bool) or place < 0:
                raise InputError(f"at has {place!r}, which is no {self.by}; give a whole number from 0 on")
            if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 <= momentum <= 1:
                raise InputError(
                    f"momentum {momentum!r} at {self.by} {place} must be a number of 0 to 1: it is the share of the "
                    "old statistics that is kept (PyTorch's momentum is 1 minus this)"
                )
        for name, value, known in (("curve", self.curve, get_args(Curve)), ("by", self.by, get_args(Unit))):
            if value not in known:
                raise InputError(f"{name}={value!r} is none of {', '.join(known)}")

    def value(self, position: int) -> float:
        """The momentum at this step or epoch."""
        places = sorted(self.at)
        index = bisect_right(places, position) - 1
        if index < 0 or index == len(places) - 1 or self.curve == "constant":
            return float(self.at[places[max(index, 0)]])
        start, end = places[index], places[index + 1]
        share = (position - start) / (end - start)
        if self.curve == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return float(self.at[start] + (self.at[end] - self.at[start]) * share)
