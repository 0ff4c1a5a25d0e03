"""The arithmetic of folding a batch norm into the layers beside it, in float64."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from flatwater.errors import StatisticsError

__all__ = [
    "Affine",
    "LinearValues",
    "NormValues",
    "WeightLayout",
    "affine_after",
    "affine_before",
    "affine_before_norm",
    "affine_of",
    "check_statistics",
]

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


class Affine(NamedTuple):
    """``scale·x + shift``, one value each per channel: what a batch norm is in ``eval()``."""

    scale: _Array
    shift: _Array


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


def affine_of(norm: NormValues) -> Affine:
    """``scale = γ·(var + ε)^(-1/2)``, ``shift = β - mean·scale``; infinite or NaN where var + ε is zero."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scale = 1.0 / np.sqrt(norm.variance + norm.epsilon)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.mean * scale
        return Affine(scale, shift if norm.bias is None else shift + norm.bias)


def affine_after(linear: LinearValues, affine: Affine) -> tuple[_Array, _Array]:
    """Weight and bias of the one linear layer that equals ``linear`` followed by ``affine``.

        w' = scale·w        b' = scale·b + shift

    per output channel. The results may be infinite where scale or shift is.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        bias = affine.shift if linear.bias is None else linear.bias * affine.scale + affine.shift
        return linear.weight * _along_outputs(affine.scale, linear), bias


def affine_before(linear: LinearValues, affine: Affine) -> tuple[_Array, _Array]:
    """Weight and bias of the one linear layer that equals ``affine`` followed by ``linear``.

        w' = w·scale        b' = b + Σw·shift

    per input channel, Σ over the inputs and taps of each output. Where ``shift`` is not zero, every output has to
    see all taps: a zero that is padded is not shifted.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        shifts = linear.weight * _along_inputs(affine.shift, linear)
        if linear.layout == "output-first":
            bias = shifts.reshape(shifts.shape[0], -1).sum(1)
        elif linear.layout == "output-last":
            bias = shifts.sum(0)
        else:
            grouped = shifts.reshape(linear.groups, -1, *shifts.shape[1:])
            bias = grouped.sum((1, *range(3, grouped.ndim))).reshape(-1)
        return linear.weight * _along_inputs(affine.scale, linear), bias if linear.bias is None else linear.bias + bias


def affine_before_norm(norm: NormValues, affine: Affine) -> tuple[_Array, _Array]:
    """γ and β of the norm that equals ``affine`` followed by ``norm``, over the same statistics.

    γ' = γ·scale        β' = β + γ·(var + ε)^(-1/2)·(shift + mean·(scale - 1))
    """
    with np.errstate(over="ignore", invalid="ignore"):
        weight = affine.scale if norm.weight is None else norm.weight * affine.scale
        bias = affine_of(norm).scale * (affine.shift + norm.mean * (affine.scale - 1.0))
        return weight, bias if norm.bias is None else norm.bias + bias


def _along_outputs(values: _Array, linear: LinearValues) -> _Array:
    """``values``, one per output channel, in a shape that multiplies the weight."""
    shape = linear.weight.shape
    kernel = (1,) * (len(shape) - 2)
    if linear.layout == "output-first":
        return values.reshape(-1, 1, *kernel)
    if linear.layout == "output-last":
        return values.reshape(1, -1)
    # Row i of a transposed weight belongs to group i // (in / groups), whose outputs are consecutive.
    rows = np.repeat(values.reshape(linear.groups, -1), shape[0] // linear.groups, axis=0)
    return rows.reshape(shape[0], shape[1], *kernel)


def _along_inputs(values: _Array, linear: LinearValues) -> _Array:
    """``values``, one per input channel, in a shape that multiplies the weight."""
    shape = linear.weight.shape
    kernel = (1,) * (len(shape) - 2)
    if linear.layout != "output-first":
        return values.reshape(-1, 1, *kernel)
    # Output o of a convolution belongs to group o // (out / groups), whose inputs are consecutive.
    rows = np.repeat(values.reshape(linear.groups, -1), shape[0] // linear.groups, axis=0)
    return rows.reshape(shape[0], shape[1], *kernel)
