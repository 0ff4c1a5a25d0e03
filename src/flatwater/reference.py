"""The oracle: what every normalization here computes, in float64 NumPy, as plainly as the papers say it.

All of them are one formula (Wu & He 2018, eq. 1-2). With S(i) the set of elements that share statistics
with element i, m = |S(i)|, and γ, β one number per channel,

    μ = 1/m Σ x       σ² = 1/m Σ (x - μ)²       x̂ = (x - μ) / √(σ² + ε)       y = act(γ·x̂ + β + residual)

and they differ in S only:

    batch norm       S(i) = all elements of i's channel, in every sample      Ioffe & Szegedy 2015
    group norm       S(i) = the channels of i's group, in i's sample          Wu & He 2018
    instance norm    S(i) = i's channel, in i's sample                        Ulyanov et al. 2016

With z = γ·x̂ + β + residual and dz = dy · act'(z), the chain rule gives (Ioffe & Szegedy 2015, section 3)

    dβ = Σ dz      dγ = Σ dz·x̂      dresidual = dz      g = γ·dz
    dx = (g - 1/m Σ g - x̂ · 1/m Σ g·x̂) / √(σ² + ε)      where μ and σ² are computed from x
    dx =  g / √(σ² + ε)                                 where they are given, so constants

with Σ over S for μ, σ² and dx, and over everything but the channel for dβ and dγ.

Arrays are (N, C, *spatial), or (N, *spatial, C) with ``axis=-1``. Any real dtype comes in, norms return
float64; between, everything is computed in the longest float that NumPy has, statistics in two passes. Nothing
is optimised: fast code is compared with this module, which tests and :mod:`flatwater.verify` alone import.

Sources:
    S. Ioffe, C. Szegedy. Batch Normalization. ICML 2015. arXiv:1502.03167
    D. Ulyanov, A. Vedaldi, V. Lempitsky. Instance Normalization. 2016. arXiv:1607.08022
    Y. Wu, K. He. Group Normalization. ECCV 2018. arXiv:1803.08494
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flatwater.errors import InputError
from flatwater.spec import Activation

__all__ = [
    "Forward",
    "Gradients",
    "Statistics",
    "activate",
    "activation_gradient",
    "batch_norm",
    "batch_norm_gradients",
    "batch_statistics",
    "group_norm",
    "group_norm_gradients",
    "group_statistics",
    "instance_norm",
    "instance_norm_gradients",
    "update_running",
]

Array = npt.NDArray[np.float64]
_Wide = npt.NDArray[np.longdouble]
_Moments = tuple[_Wide, _Wide]  # mean and variance, shaped to broadcast against a view

_LEAKY_SLOPE = 0.01


@dataclass(frozen=True)
class Statistics:
    """Mean and biased variance of sets of ``count`` elements: (C,) for batch norm, (N, groups) for group norm."""

    mean: Array
    variance: Array
    count: int


class Forward(NamedTuple):
    """The output, shaped as x, and the statistics that x was normalized with."""

    y: Array
    statistics: Statistics


class Gradients(NamedTuple):
    """The gradients of Σ dy·y: ``x`` and ``residual`` shaped as x, ``weight`` and ``bias`` of shape (C,)."""

    x: Array
    weight: Array
    bias: Array
    residual: Array


# --- Activations -------------------------------------------------------------------------------------


def activate(activation: Activation, z: npt.ArrayLike) -> _Wide:
    """act(z), elementwise, in the longest float."""
    z = _wide(z)
    match activation:
        case "none":
            return z
        case "relu":
            return np.maximum(z, 0)
        case "relu6":
            return np.clip(z, 0, 6)
        case "leaky_relu":
            return np.where(z > 0, z, _LEAKY_SLOPE * z)
        case "hardswish":
            return z * np.clip(z + 3, 0, 6) / 6
        case "swish":
            return z * _sigmoid(z)


def activation_gradient(activation: Activation, z: npt.ArrayLike) -> _Wide:
    """act'(z), elementwise, in the longest float; at the kinks, where there is none, what Paddle takes.

    That is relu'(0) = 0, relu6'(0) = relu6'(6) = 0, leaky_relu'(0) = 1, hardswish'(-3) = 0, hardswish'(3) = 1.
    """
    z = _wide(z)
    match activation:
        case "none":
            return np.ones_like(z)
        case "relu":
            return np.where(z > 0, 1, np.zeros_like(z))
        case "relu6":
            return np.where((z > 0) & (z < 6), 1, np.zeros_like(z))
        case "leaky_relu":
            return np.where(z >= 0, 1, np.full_like(z, _LEAKY_SLOPE))
        case "hardswish":
            return np.where(z <= -3, 0, np.where(z >= 3, 1, (2 * z + 3) / 6))
        case "swish":
            s = _sigmoid(z)
            return s + z * s * (1 - s)


def _sigmoid(z: _Wide) -> _Wide:
    """1 / (1 + exp(-z)), by the exponential that cannot overflow."""
    e: _Wide = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, e) / (1 + e)


# --- Batch norm --------------------------------------------------------------------------------------


def batch_statistics(x: npt.ArrayLike, *, axis: int = 1) -> Statistics:
    """Mean and biased variance of each channel, over samples and space; 0 and 0 of no elements."""
    sets = _Sets.batch(x, axis)
    return sets.public(_moments(sets.view(x), sets))


def batch_norm(
    x: npt.ArrayLike,
    *,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    residual: npt.ArrayLike | None = None,
    activation: Activation = "none",
    epsilon: float = 1e-5,
    statistics: Statistics | None = None,
    axis: int = 1,
) -> Forward:
    """Batch norm, Ioffe & Szegedy 2015: y = act(γ·(x - μ)/√(σ² + ε) + β + residual), μ and σ² per channel.

    Args:
        x: (N, C, *spatial), or (N, *spatial, C) with ``axis=-1``.
        weight: γ, (C,); 1 if None.
        bias: β, (C,); 0 if None.
        residual: shaped as x, added before the activation; 0 if None.
        activation: one of ``flatwater.spec.ACTIVATIONS``.
        epsilon: ε, added to the variance.
        statistics: None in training, for those of the batch; given, the layer is frozen (evaluation).
        axis: where the channels are.

    Raises:
        InputError: a shape does not fit the others.
    """
    sets = _Sets.batch(x, axis)
    state = _normalize(sets, x, weight, bias, residual, epsilon, statistics)
    return Forward(sets.unview(activate(activation, state.z)), sets.public(state.moments))


def batch_norm_gradients(
    dy: npt.ArrayLike,
    x: npt.ArrayLike,
    *,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    residual: npt.ArrayLike | None = None,
    activation: Activation = "none",
    epsilon: float = 1e-5,
    statistics: Statistics | None = None,
    axis: int = 1,
) -> Gradients:
    """The gradients of Σ dy·y of :func:`batch_norm`, which takes the same arguments.

    With ``statistics`` given they are constants, and no gradient flows through them.
    """
    sets = _Sets.batch(x, axis)
    state = _normalize(sets, x, weight, bias, residual, epsilon, statistics)
    return _differentiate(sets, state, dy, activation, frozen=statistics is not None)


def update_running(
    running_mean: npt.ArrayLike,
    running_variance: npt.ArrayLike,
    statistics: Statistics,
    *,
    momentum: float = 0.9,
    unbiased: bool = False,
) -> tuple[Array, Array]:
    """Running statistics after one training step: moving = momentum·moving + (1 - momentum)·batch.

    The variance that enters divides by the count m, or with ``unbiased`` by m - 1.

    Raises:
        InputError: ``unbiased`` with fewer than two values per channel, which have no such variance.
    """
    variance = statistics.variance
    if unbiased:
        if statistics.count < 2:
            raise InputError(
                f"count={statistics.count}: an unbiased variance needs two values per channel; use unbiased=False"
            )
        variance = variance * statistics.count / (statistics.count - 1)

    def step(moving: npt.ArrayLike, batch: Array) -> Array:
        return momentum * np.asarray(moving, np.float64) + (1.0 - momentum) * batch

    return step(running_mean, statistics.mean), step(running_variance, variance)


# --- Group norm and instance norm --------------------------------------------------------------------


def group_statistics(x: npt.ArrayLike, groups: int, *, axis: int = 1) -> Statistics:
    """Mean and biased variance of each sample's groups of channels, (N, groups); 0 and 0 of no elements."""
    sets = _Sets.group(x, axis, groups)
    return sets.public(_moments(sets.view(x), sets))


def group_norm(
    x: npt.ArrayLike,
    groups: int,
    *,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    residual: npt.ArrayLike | None = None,
    activation: Activation = "none",
    epsilon: float = 1e-5,
    axis: int = 1,
) -> Forward:
    """Group norm, Wu & He 2018: as :func:`batch_norm`, with μ and σ² per sample and group of C / groups channels.

    Raises:
        InputError: a shape does not fit the others, or ``groups`` does not divide C.
    """
    sets = _Sets.group(x, axis, groups)
    state = _normalize(sets, x, weight, bias, residual, epsilon, None)
    return Forward(sets.unview(activate(activation, state.z)), sets.public(state.moments))


def group_norm_gradients(
    dy: npt.ArrayLike,
    x: npt.ArrayLike,
    groups: int,
    *,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    residual: npt.ArrayLike | None = None,
    activation: Activation = "none",
    epsilon: float = 1e-5,
    axis: int = 1,
) -> Gradients:
    """The gradients of Σ dy·y of :func:`group_norm`, which takes the same arguments."""
    sets = _Sets.group(x, axis, groups)
    state = _normalize(sets, x, weight, bias, residual, epsilon, None)
    return _differentiate(sets, state, dy, activation, frozen=False)


def instance_norm(x: npt.ArrayLike, *, axis: int = 1, **options: Any) -> Forward:
    """Instance norm, Ulyanov et al. 2016: :func:`group_norm`, and its options, with one channel per group."""
    return group_norm(x, np.shape(x)[axis], axis=axis, **options)


def instance_norm_gradients(dy: npt.ArrayLike, x: npt.ArrayLike, *, axis: int = 1, **options: Any) -> Gradients:
    """The gradients of Σ dy·y of :func:`instance_norm`, which takes the same options."""
    return group_norm_gradients(dy, x, np.shape(x)[axis], axis=axis, **options)


# --- The one formula ---------------------------------------------------------------------------------


class _Sets(NamedTuple):
    """Which elements share statistics: x seen as (N, groups, channels per group, L), reduced over ``over``."""

    shape: tuple[int, ...]
    axis: int
    groups: int
    over: tuple[int, ...]

    @classmethod
    def batch(cls, x: npt.ArrayLike, axis: int) -> _Sets:
        shape = np.shape(x)
        return cls(shape, axis, groups=shape[axis], over=(0, 2, 3))

    @classmethod
    def group(cls, x: npt.ArrayLike, axis: int, groups: int) -> _Sets:
        shape = np.shape(x)
        if groups < 1 or shape[axis] % groups:
            raise InputError(f"groups={groups} must divide the number of channels, {shape[axis]}")
        return cls(shape, axis, groups, over=(2, 3))

    def view(self, array: npt.ArrayLike) -> _Wide:
        wide = _wide(array)
        if wide.shape != self.shape:
            raise InputError(f"shape {wide.shape} differs from x's {self.shape}; dy and residual are shaped as x")
        wide = np.moveaxis(wide, self.axis, 1)
        samples, channels, *spatial = wide.shape
        return wide.reshape(samples, self.groups, channels // max(self.groups, 1), math.prod(spatial))

    def unview(self, view: _Wide) -> Array:
        channels_first = np.moveaxis(np.empty(self.shape), self.axis, 1)
        return np.moveaxis(view.reshape(channels_first.shape), 1, self.axis).astype(np.float64)

    def parameter(self, vector: npt.ArrayLike | None, default: float) -> _Wide:
        channels = self.shape[self.axis]
        wide = np.full(channels, default, np.longdouble) if vector is None else _wide(vector)
        if wide.shape != (channels,):
            raise InputError(f"a parameter of shape {wide.shape}; one value for each of {channels} channels is needed")
        return wide.reshape(1, self.groups, channels // max(self.groups, 1), 1)

    def mean(self, view: _Wide) -> _Wide:
        """Mean over the sets; of no elements 0."""
        count = math.prod(view.shape[axis] for axis in self.over)
        mean: _Wide = np.sum(view, axis=self.over, keepdims=True) / max(count, 1)
        return mean

    def public(self, moments: _Moments) -> Statistics:
        count = math.prod(self.shape) // max(moments[0].size, 1)
        mean, variance = (np.squeeze(moment, self.over).astype(np.float64) for moment in moments)
        return Statistics(mean, variance, count)

    def private(self, statistics: Statistics) -> _Moments:
        return self.parameter(statistics.mean, 0.0), self.parameter(statistics.variance, 0.0)


class _State(NamedTuple):
    """What the forward pass knows and the backward pass needs."""

    moments: _Moments
    inv_std: _Wide
    weight: _Wide
    x_hat: _Wide
    z: _Wide


def _wide(array: npt.ArrayLike) -> _Wide:
    return np.asarray(array).astype(np.longdouble)


def _moments(x: _Wide, sets: _Sets) -> _Moments:
    mean = sets.mean(x)
    return mean, sets.mean((x - mean) ** 2)


def _normalize(
    sets: _Sets,
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    bias: npt.ArrayLike | None,
    residual: npt.ArrayLike | None,
    epsilon: float,
    statistics: Statistics | None,
) -> _State:
    view = sets.view(x)
    moments = _moments(view, sets) if statistics is None else sets.private(statistics)
    mean, variance = moments
    inv_std = 1 / np.sqrt(variance + epsilon)
    x_hat = (view - mean) * inv_std
    gamma = sets.parameter(weight, default=1.0)
    z = gamma * x_hat + sets.parameter(bias, default=0.0)
    if residual is not None:
        z = z + sets.view(residual)
    return _State(moments, inv_std, gamma, x_hat, z)


def _differentiate(sets: _Sets, state: _State, dy: npt.ArrayLike, activation: Activation, *, frozen: bool) -> Gradients:
    dz = sets.view(dy) * activation_gradient(activation, state.z)
    g = state.weight * dz
    dx = g * state.inv_std
    if not frozen:
        dx = (g - sets.mean(g) - state.x_hat * sets.mean(g * state.x_hat)) * state.inv_std
    weight, bias = (np.sum(term, axis=(0, 3)).reshape(-1).astype(np.float64) for term in (dz * state.x_hat, dz))
    return Gradients(sets.unview(dx), weight, bias, sets.unview(dz))
