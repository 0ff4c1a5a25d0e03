"""Group norm: statistics per sample and group of channels (Wu & He, 2018).

    mean, m2 over the channels/groups · inner values of a group    inv_std = 1 / sqrt(m2 / count + ε)
    z = γ·(x - mean)·inv_std + β + residual                        y = act(z)

    dz = dy·act'(z)    dβ = Σdz    dγ = Σdz·x̂    dresidual = dz
    dx = inv_std·(γ·dz - mean(γ·dz) - x̂·mean(γ·dz·x̂))             means over the group

Instance norm (Ulyanov et al., 2016) is ``groups == channels``; layer norm over (C, ...) is
``groups == 1``. γ and β are one per channel. Statistics are float64 arrays of outer · groups
values, sample by sample; sums are float64 arrays of one value per channel, over all samples.
Otherwise everything is as in :mod:`flatwater.kernels.batch`.
"""

from __future__ import annotations

from flatwater.kernels import _cpu
from flatwater.kernels.buffer import Buffer, Vector
from flatwater.kernels.launch import Statistics, check_groups, check_slope, check_statistics, prepare, run
from flatwater.spec import Activation

__all__ = ["group_norm_backward", "group_norm_forward", "group_normalize", "group_statistics"]


def group_statistics(x: Buffer, groups: int, mean: Statistics, m2: Statistics) -> int:
    """First half of the forward pass: fill ``mean`` and ``m2``; returns the count behind each."""
    check_groups(x, groups)
    call = prepare(x)
    call.groups = groups
    check_statistics(call, x.shape[0] * groups, mean=mean, m2=m2)
    run(_cpu.group_statistics, call, x, mean=mean, m2=m2)
    return x.shape[1] // groups * x.shape[2]


def group_normalize(
    x: Buffer,
    y: Buffer,
    *,
    groups: int,
    mean: Statistics,
    inv_std: Statistics,
    weight: Vector | None = None,
    bias: Vector | None = None,
    residual: Buffer | None = None,
    activation: Activation = "none",
) -> None:
    """Second half of the forward pass: ``y = act(γ·(x - mean)·inv_std + β + residual)``."""
    check_groups(x, groups)
    call = prepare(x, activation, weight=weight, bias=bias, y=y, residual=residual)
    call.groups = groups
    check_statistics(call, x.shape[0] * groups, mean=mean, inv_std=inv_std)
    run(_cpu.group_normalize, call, x)


def group_norm_forward(
    x: Buffer,
    y: Buffer,
    *,
    groups: int,
    mean: Statistics,
    m2: Statistics,
    inv_std: Statistics,
    epsilon: float,
    weight: Vector | None = None,
    bias: Vector | None = None,
    residual: Buffer | None = None,
    activation: Activation = "none",
) -> None:
    """Both halves, a group at a time while it is in cache; fills the statistics."""
    check_groups(x, groups)
    call = prepare(x, activation, weight=weight, bias=bias, y=y, residual=residual)
    call.groups = groups
    call.epsilon = epsilon
    check_statistics(call, x.shape[0] * groups, mean=mean, m2=m2, inv_std=inv_std)
    run(_cpu.group_norm_forward, call, x, mean=mean, m2=m2, inv_std=inv_std)


def group_norm_backward(
    dy: Buffer,
    x: Buffer,
    dx: Buffer | None,
    dresidual: Buffer | None,
    *,
    groups: int,
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
    """The backward pass: fill ``dx`` and ``dresidual`` where they are wanted, and dβ and dγ."""
    check_groups(x, groups)
    check_slope(activation, y)
    call = prepare(x, activation, weight=weight, bias=bias, dy=dy, dx=dx, residual=residual, y=y, dresidual=dresidual)
    call.groups = groups
    check_statistics(call, x.shape[0] * groups, mean=mean, inv_std=inv_std)
    check_statistics(call, x.shape[1], sum_dz=sum_dz, sum_dz_xhat=sum_dz_xhat)
    run(_cpu.group_norm_backward, call, x, sum_dz=sum_dz, sum_dz_xhat=sum_dz_xhat)
