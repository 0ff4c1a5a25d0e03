"""Data on which a batch norm shows how it computes, and how it travels to a framework in another process.

========================  =============================================================================================
ordinary                  mean 1, deviation 2: what a convolution leaves
mean / deviation = 10⁴    Σx² - (Σx)² / n cancels all that float32 holds of the variance
deviation 10⁻¹⁰ … 10⁻²⁰   the variance lies near or below the smallest float32 (1.2·10⁻³⁸, denormal 1.4·10⁻⁴⁵)
deviation 10¹⁰, 10²⁰      squares near or past the largest float32 (3.4·10³⁸)
one outlier               one value of 10⁶ deviations in each channel
========================  =============================================================================================

ε is 10⁻⁵, and 10⁻⁵·σ² where that is smaller, as at the small deviations: with 10⁻⁵ beside a variance of 10⁻⁴⁰ every
answer would be ``x / √ε``, and no variance would be asked for. At the large ones ε makes no difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["CASES", "HardCase", "hard_case", "read_case", "read_results", "write_case", "write_results"]

Floats = npt.NDArray[np.float32]

SHAPE = (16, 24, 28, 28)

CASES: dict[str, tuple[float, float, float]] = {
    "ordinary": (1.0, 2.0, 0.0),
    "mean / deviation = 1e4": (1e4, 1.0, 0.0),
    "deviation 1e-20": (0.0, 1e-20, 0.0),
    "deviation 1e-10": (0.0, 1e-10, 0.0),
    "deviation 1e10": (0.0, 1e10, 0.0),
    "deviation 1e20": (0.0, 1e20, 0.0),
    "one outlier": (0.0, 1.0, 1e6),
}
"""By name: mean, deviation, and the outlier in deviations (0: none)."""

EPSILON = 1e-5


class HardCase(NamedTuple):
    """One training step's worth of input for batch norm, (N, C, H, W)."""

    x: Floats
    dy: Floats
    weight: Floats
    bias: Floats
    epsilon: float


def hard_case(name: str, seed: int) -> HardCase:
    """One of :data:`CASES`; the same numbers every time."""
    mean, deviation, outlier = CASES[name]
    generator = np.random.default_rng(seed)
    channels = SHAPE[1]
    x = mean + deviation * generator.standard_normal(SHAPE)
    if outlier:
        x[3, :, 5, 7] = outlier * deviation
    dy = generator.standard_normal(SHAPE)
    weight, bias = generator.uniform(0.5, 1.5, channels), generator.uniform(-1.0, 1.0, channels)
    floats = [array.astype(np.float32) for array in (x, dy, weight, bias)]
    return HardCase(floats[0], floats[1], floats[2], floats[3], EPSILON * min(1.0, deviation**2))


def write_case(path: str | Path, case: HardCase) -> None:
    """Store a case where a worker finds it."""
    write_results(path, case._asdict())


def read_case(path: str | Path) -> HardCase:
    """What :func:`write_case` stored."""
    with np.load(path) as stored:
        arrays = dict(stored)
    return HardCase(**arrays | {"epsilon": float(arrays["epsilon"])})


def write_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """Store what a framework computed, by name."""
    np.savez(path, **results)


def read_results(path: str | Path) -> dict[str, npt.NDArray[Any]]:
    """What :func:`write_results` stored."""
    with np.load(path) as stored:
        return dict(stored)
