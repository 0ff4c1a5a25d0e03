"""The norms written in Paddle's elementary operators: slow, but differentiable any number of times.

Gradients that are differentiated again (gradient penalties, ``paddle.grad(create_graph=True)``)
take this road; everything else takes the kernels or Paddle's fused operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import paddle
import paddle.nn.functional as F

from flatwater.spec import Activation

if TYPE_CHECKING:
    from flatwater.paddle.autograd import BatchNormCall, GroupNormCall

__all__ = ["activate", "composite_norm"]

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


def composite_norm(
    x: paddle.Tensor,
    weight: paddle.Tensor | None,
    bias: paddle.Tensor | None,
    residual: paddle.Tensor | None,
    call: BatchNormCall | GroupNormCall,
) -> paddle.Tensor:
    """What the kernels compute for ``call``, as a graph of elementary operators."""
    axis = x.ndim - 1 if call.channels_last else 1
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    groups = getattr(call, "groups", None)
    if groups is not None:
        normalized = _normalized_by_group(x, groups, axis, call.epsilon)
    elif call.frozen:
        mean = paddle.to_tensor(call.mean.astype("float64")).astype(x.dtype).reshape(shape)
        inv_std = paddle.to_tensor(call.inv_std.astype("float64")).astype(x.dtype).reshape(shape)
        normalized = (x - mean) * inv_std
    else:
        normalized = _normalized(x, [i for i in range(x.ndim) if i != axis], call.epsilon)
    z = normalized if weight is None else normalized * weight.reshape(shape)
    z = z if bias is None else z + bias.reshape(shape)
    z = z if residual is None else z + residual
    return activate(z, call.activation)


def _normalized(x: paddle.Tensor, axes: list[int], epsilon: float) -> paddle.Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred * paddle.rsqrt((centred * centred).mean(axes, keepdim=True) + epsilon)


def _normalized_by_group(x: paddle.Tensor, groups: int, axis: int, epsilon: float) -> paddle.Tensor:
    channels = x.shape[axis]
    split = [*x.shape[:axis], groups, channels // groups, *x.shape[axis + 1 :]]
    axes = [i for i in range(1, len(split)) if i != axis]
    return _normalized(x.reshape(split), axes, epsilon).reshape(x.shape)
