"""What freezing did, and the proof afterwards that what was frozen stood still."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flatwater.surgery.report import ChangeReport

__all__ = ["Departure", "FreezeReport", "FrozenReport", "departure"]


class Departure(NamedTuple):
    """How far a tensor is from its copy.

    Attributes:
        values: how many differ in their bits.
        size: how many there are.
        max_abs: the largest difference; infinite where it cannot be told, as between NaN and a number.
    """

    values: int
    size: int
    max_abs: float

    def __str__(self) -> str:
        return f"{self.values} of {self.size} values moved, by at most {self.max_abs:.3g}"


def departure(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> Departure | None:
    """How far ``after`` is from ``before``, which is cast to its dtype; None if every bit is the same then."""
    if before.shape != after.shape:
        return Departure(after.size, after.size, math.inf)
    with np.errstate(over="ignore"):
        before = before.astype(after.dtype)
    rows = (np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8) for array in (before, after))
    differ = np.any(next(rows) != next(rows), axis=1)
    if not differ.any():
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(after.reshape(-1)[differ].astype(np.float64) - before.reshape(-1)[differ].astype(np.float64))
    return Departure(int(differ.sum()), before.size, float(np.where(np.isnan(apart), np.inf, apart).max()))


@dataclass
class FreezeReport(ChangeReport):
    """What :func:`freeze` did.

    Attributes:
        lacking: path -> what of that which was asked for a layer of this kind has not.
        notes: path of a changed layer -> why it need not hold still.
    """

    lacking: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"  {path}: {what}" for said in (self.lacking, self.notes) for path, what in said.items()]
        return "\n".join([super().__str__(), *lines])


@dataclass
class FrozenReport:
    """What became of the tensors that were frozen, each by its name in the ``state_dict``.

    Attributes:
        held: bit for bit what they were when they were frozen.
        moved: name -> how far.
        released: name -> why it is no longer frozen, whether it moved already or not.
    """

    held: list[str] = field(default_factory=list)
    moved: dict[str, Departure] = field(default_factory=dict)
    released: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything stood still, and is frozen still."""
        return not self.moved and not self.released

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: ``ok``, ``held``, ``moved``, ``released``."""
        moved = [
            {
                "name": name,
                "values": found.values,
                "size": found.size,
                "max_abs": found.max_abs if math.isfinite(found.max_abs) else None,
            }
            for name, found in self.moved.items()
        ]
        released = [{"name": name, "reason": reason} for name, reason in self.released.items()]
        return {"ok": self.ok, "held": list(self.held), "moved": moved, "released": released}

    def __str__(self) -> str:
        verdict = "nothing moved" if self.ok else f"{len(self.moved)} moved, {len(self.released)} no longer frozen"
        lines = [f"{len(self.held)} of {len(self.held) + len(self.moved)} frozen tensors held bit for bit; {verdict}"]
        lines += [f"  moved     {name}: {found}" for name, found in self.moved.items()]
        lines += [f"  released  {name}: {reason}" for name, reason in self.released.items()]
        return "\n".join(lines)
