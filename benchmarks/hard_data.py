"""Data on which a batch norm shows how it computes, and how it travels to a framework in another process.

========================  =============================================================================================
ordinary                  mean 1, deviation 2: what a convolution leaves
mean / deviation = 10⁴    Σx² - (Σx)² / n cancels all that float32 holds of the variance
deviation 10⁻¹⁰ … 10⁻²⁰   the variance lies near or below the smallest float32 (1.2·10⁻³⁸, denormal 1.4·10⁻⁴⁵)
deviation 10¹⁰, 10²⁰      squares near or past the largest float32 (3.4·10³⁸)
outlier                   one value of 10⁶ deviations in each channel: its first, one in the middle, its last
========================  =============================================================================================

Most of them channels-first in one shape that suits everybody; some channels-last, and in planes of 3 × 3 and 7 × 7.

ε is 10⁻⁵, and 10⁻⁵·σ² where that is smaller, as at the small deviations: with 10⁻⁵ beside a variance of 10⁻⁴⁰ every
answer would be ``x / √ε``, and no variance would be asked for. At the large ones ε makes no difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["CASES", "Hard", "HardCase", "hard_case", "read_case", "read_results", "write_case", "write_results"]

Floats = npt.NDArray[np.float32]


class Hard(NamedTuple):
    """A kind of data.

    Attributes:
        mean: of each channel.
        deviation: of each channel.
        outlier: where the value of 10⁶ deviations stands among those of its channel, from 0 to 1; None: nowhere.
        shape: (N, C, H, W).
        layout: how memory holds it.
    """

    mean: float = 0.0
    deviation: float = 1.0
    outlier: float | None = None
    shape: tuple[int, int, int, int] = (16, 24, 28, 28)
    layout: str = "NCHW"


CASES: dict[str, Hard] = {
    "ordinary": Hard(1.0, 2.0),
    "mean / deviation = 1e4": Hard(1e4),
    "deviation 1e-20": Hard(deviation=1e-20),
    "deviation 1e-10": Hard(deviation=1e-10),
    "deviation 1e10": Hard(deviation=1e10),
    "deviation 1e20": Hard(deviation=1e20),
    "outlier first": Hard(outlier=0.0),
    "outlier in the middle": Hard(outlier=0.4),
    "outlier last": Hard(outlier=1.0),
    "ordinary, NHWC": Hard(1.0, 2.0, layout="NHWC"),
    "outlier first, NHWC": Hard(outlier=0.0, layout="NHWC"),
    "ordinary, 64x17x3x3": Hard(1.0, 2.0, shape=(64, 17, 3, 3)),
    "outlier first, 64x17x3x3": Hard(outlier=0.0, shape=(64, 17, 3, 3)),
    "ordinary, 32x32x7x7": Hard(1.0, 2.0, shape=(32, 32, 7, 7)),
    "outlier first, 32x32x7x7": Hard(outlier=0.0, shape=(32, 32, 7, 7)),
}

EPSILON = 1e-5


class HardCase(NamedTuple):
    """One training step's worth of input for batch norm, (N, C, H, W) whatever the layout in memory is to be."""

    x: Floats
    dy: Floats
    weight: Floats
    bias: Floats
    epsilon: float
    layout: str


def hard_case(name: str, seed: int) -> HardCase:
    """One of :data:`CASES`; the same numbers every time."""
    mean, deviation, outlier, shape, layout = CASES[name]
    generator = np.random.default_rng(seed)
    samples, channels, height, width = shape
    x = mean + deviation * generator.standard_normal(shape)
    if outlier is not None:
        place = round(outlier * (samples * height * width - 1))
        sample, row, column = np.unravel_index(place, (samples, height, width))
        x[sample, :, row, column] = mean + 1e6 * deviation
    dy = generator.standard_normal(shape)
    weight, bias = generator.uniform(0.5, 1.5, channels), generator.uniform(-1.0, 1.0, channels)
    floats = [array.astype(np.float32) for array in (x, dy, weight, bias)]
    return HardCase(floats[0], floats[1], floats[2], floats[3], EPSILON * min(1.0, deviation**2), layout)


def write_case(path: str | Path, case: HardCase) -> None:
    """Store a case where a worker finds it."""
    write_results(path, case._asdict())


def read_case(path: str | Path) -> HardCase:
    """What :func:`write_case` stored."""
    with np.load(path) as stored:
        arrays = dict(stored)
    return HardCase(**arrays | {"epsilon": float(arrays["epsilon"]), "layout": str(arrays["layout"])})


def write_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """Store what a framework computed, by name."""
    np.savez(path, **results)


def read_results(path: str | Path) -> dict[str, npt.NDArray[Any]]:
    """What :func:`write_results` stored."""
    with np.load(path) as stored:
        return dict(stored)
