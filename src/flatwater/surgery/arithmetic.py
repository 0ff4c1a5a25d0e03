"""The arithmetic of folding a batch norm into the linear layer before it, in float64."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from flatwater.errors import StatisticsError

__all__ = ["LinearValues", "NormValues", "WeightLayout", "check_statistics", "fold_values"]

_Array: TypeAlias = npt.NDArray[np.float64]

WeightLayout = Literal["output-first", "output-last", "transposed"]
"""Where a weight keeps its output channels:

``output-first``   [out, in / groups, ...], a convolution
``output-last``    [in, out], Paddle's ``Linear``
``transposed``     [in, out / groups, ...], a transposed convolution
"""


class LinearValues(NamedTuple):
    """Weight and bias of a convolution or another linear layer."""

    weight: _Array
    bias: _Array | None
    layout: WeightLayout
    groups: int = 1


class NormValues(NamedTuple):
    """What a batch norm computes with in ``eval()``; γ = 1 and β = 0 where they are None."""

    mean: _Array
    variance: _Array
    weight: _Array | None
    bias: _Array | None
    epsilon: float


def check_statistics(path: str, norm: NormValues) -> None:
    """Refuse running statistics that no training with finite activations leaves behind.

    Raises:
        StatisticsError: a mean or variance is NaN or infinite, or a variance negative.
    """
    for name, values in (("mean", norm.mean), ("variance", norm.variance)):
        bad = ~np.isfinite(values) | ((values < 0) if name == "variance" else False)
        if bad.any():
            channel = int(np.flatnonzero(bad)[0])
            raise StatisticsError(
                f"the running {name} of norm layer {path!r} is {values.flat[channel]} in channel {channel} "
                f"({int(bad.sum())} of {bad.size} channels are bad); train from an earlier checkpoint"
            )


def fold_values(linear: LinearValues, norm: NormValues) -> tuple[_Array, _Array]:
    """Weight and bias of the one linear layer that equals ``linear`` followed by ``norm``.

        w' = w·γ·(var + ε)^(-1/2)        b' = β + (b - mean)·γ·(var + ε)^(-1/2)

    per output channel, everything in float64. The results may be infinite where var + ε is zero.
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scale = 1.0 / np.sqrt(norm.variance + norm.epsilon)
        if norm.weight is not None:
            scale = scale * norm.weight
        bias = -norm.mean if linear.bias is None else linear.bias - norm.mean
        bias = bias * scale
        if norm.bias is not None:
            bias = bias + norm.bias
        return linear.weight * _along_outputs(scale, linear), bias


def _along_outputs(scale: _Array, linear: LinearValues) -> _Array | npt.NDArray[Any]:
    """``scale``, one value per output channel, in a shape that multiplies the weight."""
    shape = linear.weight.shape
    kernel = (1,) * (len(shape) - 2)
    if linear.layout == "output-first":
        return scale.reshape(-1, 1, *kernel)
    if linear.layout == "output-last":
        return scale.reshape(1, -1)
    # Row i of a transposed weight belongs to group i // (in / groups), whose outputs are consecutive.
    rows = np.repeat(scale.reshape(linear.groups, -1), shape[0] // linear.groups, axis=0)
    return rows.reshape(shape[0], shape[1], *kernel)
