"""What rounding alone does to a model, to tell it from what is wrong.

Some networks multiply rounding from layer to layer. How far is measured by moving every number of the inputs by one
unit in the last place, up or down: the outputs then move about as far as they are from the same model in float64. On
five networks with 35 to 82 norms the two were within a factor of 2.1 of each other, and Paddle Inference, ONNX Runtime
and folding were off by up to 2 times that movement; γ of one norm in the middle, wrong by 1%, moved the outputs by more
than 700 times it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MOST_NOISE", "NOISE_FACTOR", "shaken", "with_rounding"]

NOISE_FACTOR = 8.0
"""What is allowed, in movements by one unit in the last place of the inputs: who folds or fuses rounds more often."""

MOST_NOISE = 1e-2
"""The largest tolerance that comes of it: a model that moves further when a bit of its input does proves nothing."""


def with_rounding(tolerance: float, noise: float) -> float:
    """The tolerance where the model moves by ``noise`` when its inputs move by one unit in the last place."""
    return max(tolerance, min(NOISE_FACTOR * noise, MOST_NOISE))


def shaken(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Every float moved up or down by one unit in the last place, the same way in every run."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    towards = np.random.default_rng(20150211).choice([-np.inf, np.inf], array.shape).astype(array.dtype)
    with np.errstate(over="ignore"):
        moved = np.nextafter(array, towards)
    return np.where(np.isfinite(array) & np.isfinite(moved), moved, array)
