"""Batch norm: statistics per channel over samples and inner dimension (Ioffe & Szegedy, 2015).

    mean = Σx / count        m2 = Σ(x - mean)²        inv_std = 1 / sqrt(m2 / count + ε)
    z = γ·(x - mean)·inv_std + β + residual           y = act(z)

    dz = dy·act'(z)          dβ = Σdz                 dγ = Σdz·x̂          dresidual = dz
    dx = γ·inv_std·(dz - Σdz / count - x̂·Σdz·x̂ / count)

Both directions come whole and in two halves. Statistics shared between processes are combined
between the halves; nothing else differs. z is computed again from x and the residual in the
backward pass, so nothing but the statistics has to be kept. Or the backward pass is given ``y``, as
the forward pass has filled it, for relu, relu6 and leaky_relu: then act'(z) is taken from y, z being
compared with the kinks as y's dtype has rounded it, and the residual is not read.

Statistics and sums are float64 arrays of one value per channel, owned by the caller. Tensors are
borrowed, share dtype, shape and layout, and may be empty: then the sums that a call fills are 0, and
inv_std is 1 / sqrt(ε). What a call fills lies apart from everything else that it is given. Every function
raises InputError where its arguments do not fit each other.
"""

from __future__ import annotations

from flatwater.errors import InputError
from flatwater.kernels import _cpu
from flatwater.kernels.buffer import WIDTHS, Buffer, Vector
from flatwater.kernels.launch import (
    Statistics,
    check_apart,
    check_slope,
    check_statistics,
    check_writable,
    doubles,
    prepare,
    run,
)
from flatwater.spec import Activation

__all__ = [
    "batch_gradient_sums",
    "batch_input_gradient",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_normalize",
    "batch_statistics",
    "store",
    "update_running",
]


def batch_statistics(x: Buffer, mean: Statistics, m2: Statistics) -> int:
    """First half of the forward pass: fill ``mean`` and ``m2``; returns the count behind them."""
    call = prepare(x)
    check_statistics(call, x.shape[1], mean=mean, m2=m2)
    run(_cpu.batch_statistics, call, x, mean=mean, m2=m2)
    return _count(x)


def batch_normalize(
    x: Buffer,
    y: Buffer,
    *,
    mean: Statistics,
    inv_std: Statistics,
    weight: Vector | None = None,
    bias: Vector | None = None,
    residual: Buffer | None = None,
    activation: Activation = "none",
) -> None:
    """Second half of the forward pass: ``y = act(γ·(x - mean)·inv_std + β + residual)``."""
    call = prepare(x, activation, weight=weight, bias=bias, y=y, residual=residual)
    check_statistics(call, x.shape[1], mean=mean, inv_std=inv_std)
    run(_cpu.batch_normalize, call, x)


def batch_norm_forward(
    x: Buffer,
    y: Buffer,
    *,
    mean: Statistics,
    m2: Statistics,
    inv_std: Statistics,
    epsilon: float,
    weight: Vector | None = None,
    bias: Vector | None = None,
    residual: Buffer | None = None,
    activation: Activation = "none",
) -> int:
    """Both halves, a channel at a time while it is in cache; fills the statistics, returns the count."""
    call = prepare(x, activation, weight=weight, bias=bias, y=y, residual=residual)
    check_statistics(call, x.shape[1], mean=mean, m2=m2, inv_std=inv_std)
    call.epsilon = epsilon
    run(_cpu.batch_norm_forward, call, x, mean=mean, m2=m2, inv_std=inv_std)
    return _count(x)


def batch_gradient_sums(
    dy: Buffer,
    x: Buffer,
    *,
    mean: Statistics,
    inv_std: Statistics,
    sum_dz: Statistics,
    sum_dz_xhat: Statistics,
    weight: Vector | None = None,
    bias: Vector | None = None,
    residual: Buffer | None = None,
    y: Buffer | None = None,
    activation: Activation = "none",
) -> None:
    """First half of the backward pass: fill ``sum_dz`` (dβ) and ``sum_dz_xhat`` (dγ)."""
    check_slope(activation, y)
    call = prepare(x, activation, weight=weight, bias=bias, dy=dy, residual=residual, y=y)
    check_statistics(call, x.shape[1], mean=mean, inv_std=inv_std, sum_dz=sum_dz, sum_dz_xhat=sum_dz_xhat)
    run(_cpu.batch_gradient_sums, call, x, sum_dz=sum_dz, sum_dz_xhat=sum_dz_xhat)


def batch_input_gradient(
    dy: Buffer,
    x: Buffer,
    dx: Buffer | None,
    dresidual: Buffer | None,
    *,
    mean: Statistics,
    inv_std: Statistics,
    sum_dz: Statistics,
    sum_dz_xhat: Statistics,
    count: int,
    weight: Vector | None = None,
    bias: Vector | None = None,
    residual: Buffer | None = None,
    y: Buffer | None = None,
    activation: Activation = "none",
) -> None:
    """Second half of the backward pass: fill ``dx`` and ``dresidual``, where they are wanted.

    Args:
        count: values per channel behind the statistics and sums, over all processes. 0 says that
            the statistics are constants (a frozen layer): then ``dx = γ·inv_std·dz``.
    """
    check_slope(activation, y)
    call = prepare(x, activation, weight=weight, bias=bias, dy=dy, dx=dx, residual=residual, y=y, dresidual=dresidual)
    check_statistics(call, x.shape[1], mean=mean, inv_std=inv_std, sum_dz=sum_dz, sum_dz_xhat=sum_dz_xhat)
    call.count = count
    if dx is not None or dresidual is not None:
        run(_cpu.batch_input_gradient, call, x)


def batch_norm_backward(
    dy: Buffer,
    x: Buffer,
    dx: Buffer | None,
    dresidual: Buffer | None,
    *,
    mean: Statistics,
    inv_std: Statistics,
    sum_dz: Statistics,
    sum_dz_xhat: Statistics,
    weight: Vector | None = None,
    bias: Vector | None = None,
    residual: Buffer | None = None,
    y: Buffer | None = None,
    activation: Activation = "none",
    frozen: bool = False,
) -> None:
    """Both halves, a channel at a time while it is in cache.

    Args:
        frozen: the statistics are constants, not functions of x: ``dx = γ·inv_std·dz``.
    """
    check_slope(activation, y)
    call = prepare(x, activation, weight=weight, bias=bias, dy=dy, dx=dx, residual=residual, y=y, dresidual=dresidual)
    check_statistics(call, x.shape[1], mean=mean, inv_std=inv_std, sum_dz=sum_dz, sum_dz_xhat=sum_dz_xhat)
    call.count = 0 if frozen else _count(x)
    run(_cpu.batch_norm_backward, call, x, sum_dz=sum_dz, sum_dz_xhat=sum_dz_xhat)


def update_running(
    running_mean: Vector,
    running_variance: Vector,
    *,
    mean: Statistics,
    m2: Statistics,
    count: int,
    momentum: float,
    unbiased: bool,
) -> None:
    """``moving = momentum · moving + (1 - momentum) · batch``, in place.

    Args:
        count: values per channel behind ``mean`` and ``m2``; 0 changes nothing.
        momentum: share of the OLD value that is kept.
        unbiased: the batch variance is ``m2 / (count - 1)`` instead of ``m2 / count``. A single
            value has no unbiased variance; its biased one, 0, is taken.
    """
    size = running_mean.size
    check_writable(running_mean=running_mean, running_variance=running_variance)
    if running_variance[1:3] != running_mean[1:3]:
        raise InputError(
            f"running statistics of {size} {running_mean.dtype} and {running_variance.size} {running_variance.dtype} "
            "values; give one value per channel, of one dtype"
        )
    found = doubles(mean, size, "mean"), doubles(m2, size, "m2")
    vectors = {"running_mean": running_mean, "running_variance": running_variance}
    places = [(at.pointer, at.pointer + size * WIDTHS[at.dtype], name) for name, at in vectors.items()]
    places += [(at, at + 8 * size, name) for at, name in zip(found, ("mean", "m2"), strict=True)]
    check_apart(places, vectors.keys())
    _cpu.update_running(
        running_mean.pointer,
        running_variance.pointer,
        running_mean.dtype == "float64",
        *found,
        size,
        count,
        momentum,
        unbiased,
    )


def store(values: Statistics, target: Vector) -> None:
    """Round a float64 array into the memory of a parameter's gradient."""
    check_writable(target=target)
    address = doubles(values, target.size, "the array to store")
    _cpu.store(address, target.pointer, target.dtype == "float64", target.size)


def _count(x: Buffer) -> int:
    outer, channels, inner = x.shape
    return outer * inner if channels else 0
