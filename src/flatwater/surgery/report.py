"""What surgery did to a model, what it left alone, and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["ChangeReport", "FoldReport", "FoldedPair", "Movement"]


class FoldedPair(NamedTuple):
    """A norm layer, and the layer that took it up (mostly the convolution before it), by path.

    Several pairs share their norm where several layers took it up: convolutions whose outputs are joined before it.
    """

    conv: str
    norm: str


class Movement(NamedTuple):
    """How far apart two runs of a model on the same inputs are.

    ``max_rel`` is the largest difference within a tensor divided by the tensor's largest magnitude
    before; infinite if the two cannot be compared, as NaN and a number.
    """

    max_abs: float
    max_rel: float
    where: str = ""


@dataclass
class ChangeReport:
    """What was done to the norm layers of a model: converted, reverted, frozen or thawed.

    Attributes:
        changed: paths of the layers that were changed.
        left: path -> why a norm layer was left as it was.
    """

    changed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} norm layers changed, {len(self.left)} left"]
        lines += [f"  {path}: {reason}" for path, reason in self.left.items()]
        return "\n".join(lines)


@dataclass
class FoldReport:
    """What :func:`fold` did, and the way back.

    Attributes:
        folded: the pairs that are one layer now.
        left: path of a norm layer -> why it stayed.
        max_abs, max_rel: how far the model's outputs on the example inputs moved, see :class:`Movement`.
        tolerance: how far, relative to its scale, an output was allowed to move.
        rewritten: paths of the layers that write another tensor now, so that the model computes the same: what
            absorbed a norm behind it, and norms that went into what follows them.
    """

    folded: list[FoldedPair]
    left: dict[str, str]
    max_abs: float
    max_rel: float
    tolerance: float
    rewritten: set[str] = field(default_factory=set)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def norms(self) -> list[str]:
        """Each norm layer that was folded, once."""
        return list(dict.fromkeys(pair.norm for pair in self.folded))

    def undo(self) -> None:
        """Put weights, biases and norm layers back, bit for bit. A second call does nothing.

        Raises:
            SurgeryError: somebody replaced a folded norm layer since.
        """
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: ``folded``, ``left``, ``max_abs``, ``max_rel``, ``tolerance``."""
        return {
            "folded": [pair._asdict() for pair in self.folded],
            "left": [{"norm": path, "reason": reason} for path, reason in self.left.items()],
            "max_abs": self.max_abs if math.isfinite(self.max_abs) else None,
            "max_rel": self.max_rel if math.isfinite(self.max_rel) else None,
            "tolerance": self.tolerance,
        }

    def __str__(self) -> str:
        lines = [
            f"{len(self.norms)} norm layers folded, {len(self.left)} left; outputs moved by at most "
            f"{self.max_abs:.2g} ({self.max_rel:.2g} of their scale, tolerance {self.tolerance:.2g})"
        ]
        lines += [f"  folded  {pair.norm} into {pair.conv}" for pair in self.folded]
        lines += [f"  left    {path}: {reason}" for path, reason in self.left.items()]
        return "\n".join(lines)
