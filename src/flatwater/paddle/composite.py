"""Activations and gradients written in Paddle's own operators.

Gradients that are differentiated again (gradient penalties, ``paddle.grad(create_graph=True)``) take
this road: slow, but every operator on it has a gradient of its own. Everything else takes the kernels
or Paddle's fused operators.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from flatwater.paddle.calls import NormCall
from flatwater.paddle.saved import Saved
from flatwater.spec import Activation

__all__ = ["activate", "composite_gradients", "exportable_group_norm"]

_ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "swish": F.silu,
}


def activate(z: paddle.Tensor, activation: Activation) -> paddle.Tensor:
    """``act(z)`` with Paddle's own operator."""
    return z if activation == "none" else _ACTIVATIONS[activation](z)


def composite_gradients(dy: paddle.Tensor, saved: Saved, call: NormCall) -> tuple[paddle.Tensor, ...]:
    """The gradients for x, γ, β and the residual, as differentiable functions of ``dy`` and of each of them.

    With dz = dy·act'(z), and means over everything that shares statistics,

        dx = (γ·dz - mean(γ·dz) - x̂·mean(γ·dz·x̂))·inv_std        dγ = Σdz·x̂        dβ = Σdz

    and only ``γ·dz·inv_std`` for frozen statistics.
    """
    x, weight, bias, residual, y = saved
    axis = x.ndim - 1 if call.channels_last else 1
    channels = x.shape[axis]
    groups, frozen = call.groups, call.frozen
    # Seen as (samples, groups, channels of a group, inner ...), statistics are over all but the kept axes.
    split = [*x.shape[:axis], groups or channels, channels // (groups or channels), *x.shape[axis + 1 :]]
    kept = (axis,) if groups is None else (0, axis)
    shared = [i for i in range(len(split)) if i not in kept]
    per_channel = [i for i in range(len(split)) if i not in (axis, axis + 1)]
    affine = [size if i in (axis, axis + 1) else 1 for i, size in enumerate(split)]

    x, dy = x.reshape(split), dy.reshape(split)
    if frozen:
        mean, inv_std = (paddle.to_tensor(value).astype(x.dtype).reshape(affine) for value in (call.mean, call.inv_std))
    else:
        mean = x.mean(shared, keepdim=True)
        inv_std = paddle.rsqrt((x - mean).square().mean(shared, keepdim=True) + call.epsilon)
    xhat = (x - mean) * inv_std
    gamma = 1.0 if weight is None else weight.reshape(affine)
    if y is not None:
        dz = dy * _slope_from_output(y.reshape(split), call.activation)
    else:
        z = xhat * gamma if bias is None else xhat * gamma + bias.reshape(affine)
        z = z if residual is None else z + residual.reshape(split)
        dz = dy * _slope(z, call.activation)
    dxhat = gamma * dz
    if not frozen:
        dxhat = dxhat - dxhat.mean(shared, keepdim=True) - xhat * (dxhat * xhat).mean(shared, keepdim=True)
    shape = [*split[:axis], channels, *split[axis + 2 :]]
    return (
        (dxhat * inv_std).reshape(shape),
        (dz * xhat).sum(per_channel).reshape([channels]),
        dz.sum(per_channel).reshape([channels]),
        dz.reshape(shape),
    )


def exportable_group_norm(
    x: paddle.Tensor,
    weight: paddle.Tensor | None,
    bias: paddle.Tensor | None,
    *,
    groups: int,
    channels: int,
    epsilon: float,
    channels_last: bool,
) -> paddle.Tensor:
    """Group norm as a graph that survives conversion to ONNX.

    paddle2onnx 2.1 turns Paddle's ``group_norm`` into an InstanceNormalization whose result is NaN or wrong as
    soon as a model has two of them. Here are elementary operators; sizes of batch and plane may be unknown.
    """
    size = channels // groups
    rank = len(x.shape)
    if channels_last:
        split, over, repeats, shape = [0, -1, groups, size], [1, 3], [1, 1, 1, size], [0, *[1] * (rank - 2), channels]
    else:
        split, over, repeats, shape = [0, groups, -1], [2], [1, 1, size], [0, channels, *[1] * (rank - 2)]

    def group_mean(values: paddle.Tensor) -> paddle.Tensor:
        """The mean of each group, shaped to broadcast against x."""
        return values.reshape(split).mean(over, keepdim=True).tile(repeats).reshape(shape)

    affine = [channels if i == (rank - 1 if channels_last else 1) else 1 for i in range(rank)]
    centred = x - group_mean(x)
    z = centred * paddle.rsqrt(group_mean(centred * centred) + epsilon)
    z = z if weight is None else z * weight.reshape(affine)
    return z if bias is None else z + bias.reshape(affine)


def _slope(z: paddle.Tensor, activation: Activation) -> paddle.Tensor | float:
    """act'(z); at a kink what Paddle takes."""
    match activation:
        case "relu":
            return (z > 0).astype(z.dtype)
        case "relu6":
            return paddle.logical_and(z > 0, z < 6).astype(z.dtype)
        case "leaky_relu":
            return paddle.where(z >= 0, paddle.ones_like(z), paddle.full_like(z, 0.01))
        case "hardswish":
            return paddle.where(z <= -3, paddle.zeros_like(z), paddle.where(z >= 3, paddle.ones_like(z), z / 3 + 0.5))
        case "swish":
            s = F.sigmoid(z)
            return s + z * s * (1 - s)
    return 1.0


def _slope_from_output(y: paddle.Tensor, activation: Activation) -> paddle.Tensor | float:
    """act'(z) from y = act(z); constant between kinks, so that it has no derivative to lose."""
    if activation == "leaky_relu":  # of a z close enough to 0 only the sign is left
        return paddle.where(paddle.signbit(y), paddle.full_like(y, 0.01), paddle.ones_like(y))
    return _slope(y, activation)
