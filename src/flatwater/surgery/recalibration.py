"""Population statistics from parts of the population, and the report of what they changed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["LayerChange", "Pool", "RecalibrationReport", "layer_change"]

_Array: TypeAlias = npt.NDArray[np.float64]


@dataclass
class Pool:
    """Count, mean and M2 = Σ(x - mean)² of all values of each channel, put together from parts in float64.

    Two parts a and b combine as (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance")

        n = n_a + n_b        δ = mean_b - mean_a        mean = mean_a + δ·n_b/n        M2 = M2_a + M2_b + δ²·n_a·n_b/n

    so that parts of unequal size weigh what they hold, and nothing large is subtracted from something large.

    Attributes:
        mean, m2: one per channel.
        count: values per channel.
        calls: parts.
    """

    mean: _Array
    m2: _Array
    count: int = 0
    calls: int = 0

    @classmethod
    def empty(cls, channels: int) -> Pool:
        """A pool of nothing."""
        return cls(np.zeros(channels), np.zeros(channels))

    def add(self, count: int, mean: _Array, m2: _Array) -> None:
        """Put another part in."""
        self.calls += 1
        if not count:
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta**2 * (self.count * (count / total))
        self.count = total

    @property
    def variance(self) -> _Array:
        """M2 / n, biased as that which Paddle's running variance follows on the CPU."""
        return self.m2 / max(self.count, 1)


@dataclass(frozen=True)
class LayerChange:
    """How the statistics of one batch norm layer changed.

    Attributes:
        path: the layer's.
        calls: how often the layer ran on this rank.
        count: values per channel behind its new statistics, over all ranks.
        mean_shift: |new mean - old mean| / √(old variance + ε): the largest of all channels, and its median.
        variance_ratio: (new variance + ε) / (old variance + ε): the least and the largest of all channels. NaN, as
            the shift, where the old statistics were none.
    """

    path: str
    calls: int
    count: int
    mean_shift: tuple[float, float]
    variance_ratio: tuple[float, float]


def layer_change(path: str, pool: Pool, mean: _Array, variance: _Array, epsilon: float) -> LayerChange:
    """The change from the old ``mean`` and ``variance`` to those of ``pool``."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        shift = np.abs(pool.mean - mean) / np.sqrt(variance + epsilon)
        ratio = (pool.variance + epsilon) / (variance + epsilon)
    return LayerChange(
        path,
        pool.calls,
        pool.count,
        (float(shift.max()), float(np.median(shift))),
        (float(ratio.min()), float(ratio.max())),
    )


@dataclass
class RecalibrationReport:
    """What :func:`recalibrate` did, and the way back. Prints as a table.

    Attributes:
        layers: what was recalibrated, in the order of ``model.named_sublayers()``.
        left: path -> why a batch norm layer kept its statistics.
        passes: how often the loader was read.
        batches: how many batches were read in each pass, on this rank.
    """

    layers: list[LayerChange]
    left: dict[str, str]
    passes: int
    batches: int
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the old statistics back, bit for bit. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: ``layers``, each with the fields of :class:`LayerChange`, ``left``, ``passes``, ``batches``.

        Numbers that are not finite are null.
        """
        layers = [
            asdict(change)
            | {
                "mean_shift": [_finite(number) for number in change.mean_shift],
                "variance_ratio": [_finite(number) for number in change.variance_ratio],
            }
            for change in self.layers
        ]
        left = [{"path": path, "reason": reason} for path, reason in self.left.items()]
        return {"layers": layers, "left": left, "passes": self.passes, "batches": self.batches}

    def __rich__(self) -> Table:
        left = "\n".join(escape(f"left {path}: {reason}") for path, reason in self.left.items())
        table = Table(
            title=f"{len(self.layers)} layers recalibrated; batches per pass: {self.batches}, passes: {self.passes}",
            caption=left or None,
            caption_justify="left",
        )
        table.add_column("layer", overflow="fold")
        for heading in ("values", "max |Δmean|/σ", "median", "min var'/var", "max var'/var"):
            table.add_column(heading, justify="right")
        for change in self.layers:
            numbers = (*change.mean_shift, *change.variance_ratio)
            table.add_row(escape(change.path), str(change.count), *(_number(number) for number in numbers))
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"
