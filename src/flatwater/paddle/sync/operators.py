"""Synchronised batch norm in Paddle's own operators, for devices and dtypes that the kernels do not know.

The same sums as in :mod:`flatwater.paddle.sync.call`, computed in float64 on the device and summed over the ranks by
the group of the device; autograd does the rest, for the gradient of a sum over ranks is a sum over ranks. So there is
one collective in each direction here too. It is right, and not fast: float64 takes the place of the two passes that
the kernels make.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle.autograd import PyLayer

from flatwater.paddle.composite import activate
from flatwater.paddle.running import to_numpy
from flatwater.paddle.sync.call import SyncNormCall, refuse_second_derivative
from flatwater.paddle.sync.collectives import Direction

__all__ = ["normalize_by_operators", "update_by_operators"]


def normalize_by_operators(
    x: paddle.Tensor,
    weight: paddle.Tensor | None,
    bias: paddle.Tensor | None,
    residual: paddle.Tensor | None,
    call: SyncNormCall,
) -> paddle.Tensor:
    """``act(γ·x̂ + β + residual)`` by the statistics of all ranks, which ``call`` receives; differentiable once.

    Raises:
        DistributedError, SingleValueError: as on the kernels' road.
    """
    learning = [tensor for tensor in (weight, bias, residual) if tensor is not None and not tensor.stop_gradient]
    if x.stop_gradient and learning and paddle.is_grad_enabled():
        # There is a backward pass, and another rank may want x's gradient: this one has to come to the sum.
        x = x.detach()
        x.stop_gradient = False
    axis = x.ndim - 1 if call.channels_last else 1
    channels = x.shape[axis]
    affine = [channels if i == axis else 1 for i in range(x.ndim)]
    shared = [i for i in range(x.ndim) if i != axis]

    centred = x.astype("float64") - paddle.to_tensor(call.pivot, place=x.place).reshape(affine)
    count = paddle.full([1], x.size // channels, "float64")
    total = _SumOverRanks.apply(
        paddle.concat([count, centred.sum(shared), centred.square().sum(shared)]), call, "forward"
    )
    call.take_total(np.array(total.numpy()))
    shift, square = (part / call.count for part in total[1:].split(2))
    inv_std = paddle.rsqrt(paddle.clip(square - shift.square(), min=0.0) + call.epsilon)
    z = (centred - shift.reshape(affine)) * inv_std.reshape(affine)
    z = z if weight is None else z * weight.astype("float64").reshape(affine)
    z = z if bias is None else z + bias.astype("float64").reshape(affine)
    z = z if residual is None else z + residual.astype("float64")
    return activate(z, call.activation).astype(x.dtype)


def update_by_operators(mean: paddle.Tensor, variance: paddle.Tensor, call: SyncNormCall, momentum: float) -> None:
    """``moving = momentum · moving + (1 - momentum) · batch``, wherever these buffers are."""
    for tensor, batch in ((mean, call.mean), (variance, call.m2 / call.count)):
        moving = momentum * to_numpy(tensor).astype(np.float64) + (1.0 - momentum) * batch
        tensor.set_value(paddle.to_tensor(moving, place=tensor.place).astype(tensor.dtype))


class _SumOverRanks(PyLayer):
    @staticmethod
    def forward(ctx: Any, vector: paddle.Tensor, call: SyncNormCall, direction: Direction) -> paddle.Tensor:
        ctx.call = call
        total = call.sum(np.array(vector.numpy()), direction)
        return paddle.to_tensor(total, place=vector.place)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> paddle.Tensor:
        call: SyncNormCall = ctx.call
        refuse_second_derivative(call)
        total = call.sum(np.array(gradient.numpy()), "backward")
        return paddle.to_tensor(total, place=gradient.place)
