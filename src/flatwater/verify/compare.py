"""How far apart two tensors are, and how far two forms of one model may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flatwater.errors import InputError

__all__ = [
    "TOLERANCES",
    "Difference",
    "check_tolerance",
    "default_tolerance",
    "difference",
    "largest_difference",
    "same_argmax",
    "same_items",
]

TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""By dtype of the parameters: how far, relative to the scale of the output, two forms of a model may be apart.

Two forms add the same products in another order and fuse multiplications, so that each layer is off by a
few units in the last place (6e-8 in float32), and cancellation in some layers makes that larger. Networks
of up to a hundred layers were seen between 1e-7 and 1e-5 in float32. About a thousand units in the last place
leave room for deeper ones; a wrong layer moves the output by much more.
"""


class Difference(NamedTuple):
    """``max_abs`` = max |other - reference|; ``max_rel`` = max_abs / max |reference|, within one tensor.

    Both are infinite if the tensors cannot be compared; ``note`` says why.
    """

    max_abs: float
    max_rel: float
    note: str = ""


def check_tolerance(tolerance: float) -> float:
    """The tolerance, if it is one.

    Raises:
        InputError: it is no finite number of at least 0. Against NaN everything would pass.
    """
    number = isinstance(tolerance, int | float | np.number) and not isinstance(tolerance, bool)
    if not number or not 0 <= tolerance < np.inf:
        raise InputError(f"tolerance={tolerance!r} is no finite number of at least 0; give how far outputs may be off")
    return float(tolerance)


def default_tolerance(dtype: str) -> float:
    """The tolerance for parameters of ``dtype``; float32's for whatever is not listed."""
    return TOLERANCES.get(dtype, TOLERANCES["float32"])


def difference(reference: npt.NDArray[Any], other: npt.NDArray[Any]) -> Difference:
    """Compare two tensors of one shape; NaN and infinity equal only themselves.

    A single value may have the shape [] in one form and [1] in the other: paddle2onnx writes no tensors of rank 0.
    """
    if {reference.shape, other.shape} == {(), (1,)}:
        reference, other = reference.reshape(1), other.reshape(1)
    if reference.shape != other.shape:
        return Difference(np.inf, np.inf, f"shape {list(other.shape)} instead of {list(reference.shape)}")
    if reference.size == 0:
        return Difference(0.0, 0.0)
    expected, actual = reference.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], actual[~finite], equal_nan=True):
        return Difference(np.inf, np.inf, "NaN or infinity is not reproduced")
    if not np.isfinite(actual[finite]).all():
        return Difference(np.inf, np.inf, "NaN or infinity where a number was")
    if not finite.any():
        return Difference(0.0, 0.0)
    max_abs = float(np.abs(actual[finite] - expected[finite]).max())
    scale = float(np.abs(expected[finite]).max())
    if max_abs == 0.0:
        return Difference(0.0, 0.0)
    return Difference(max_abs, max_abs / scale if scale > 0.0 else np.inf)


def largest_difference(reference: Sequence[npt.NDArray[Any]], other: Sequence[npt.NDArray[Any]]) -> Difference:
    """The largest ``max_abs`` and the largest ``max_rel`` over the outputs of a model, each output on its own scale."""
    if len(reference) != len(other):
        return Difference(np.inf, np.inf, f"{len(other)} outputs instead of {len(reference)}")
    each = [difference(one, two) for one, two in zip(reference, other, strict=True)]
    if not each:
        return Difference(0.0, 0.0)
    worst = max(range(len(each)), key=lambda index: each[index].max_rel)
    note = each[worst].note
    if note and len(each) > 1:
        note = f"output {worst}: {note}"
    return Difference(max(one.max_abs for one in each), each[worst].max_rel, note)


def same_argmax(reference: Sequence[npt.NDArray[Any]], other: Sequence[npt.NDArray[Any]]) -> float | None:
    """The share of places at which the class with the largest value is the same.

    Floating-point outputs with at least two classes count, all their places alike: [N, classes] and
    [N, steps, classes] have them on the last axis, tensors of more axes on the second. None if there is no such output.
    """
    same = places = 0
    for one, two in zip(reference, other, strict=True):
        axis = -1 if one.ndim < 4 else 1
        if one.ndim < 2 or one.shape[axis] < 2 or one.size == 0 or not np.issubdtype(one.dtype, np.floating):
            continue
        equal = one.argmax(axis) == two.argmax(axis)
        same += int(equal.sum())
        places += equal.size
    return same / places if places else None


def same_items(reference: Sequence[Any], other: Sequence[Any]) -> float:
    """The share of items that are equal; those that only one of the two has are not."""
    count = max(len(reference), len(other))
    return sum(one == two for one, two in zip(reference, other, strict=False)) / count if count else 1.0
