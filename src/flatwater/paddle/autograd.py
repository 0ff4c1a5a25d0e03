"""The kernels as differentiable Paddle functions: raw memory on one side, autograd on the other.

Only plain dynamic mode comes here (:mod:`flatwater.paddle.backend` decides): a ``PyLayer`` that
reads raw memory inside a captured graph would lose its gradients without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import paddle
from paddle.autograd import PyLayer

from flatwater import kernels
from flatwater.kernels import Buffer, Statistics, Vector
from flatwater.paddle.composite import composite_gradients
from flatwater.paddle.pruning import asked_for
from flatwater.spec import Activation

__all__ = ["BatchNormCall", "GroupNormCall", "batch_norm", "group_norm", "running_statistics", "update_running"]


@dataclass
class BatchNormCall:
    """One call of batch norm: its settings, and the statistics that it leaves behind.

    Attributes:
        channels_last: where the channels of x stand.
        activation: fused after γ·x̂ + β + residual.
        epsilon: added to the variance.
        mean, inv_std: float64, one per channel. Given where ``frozen``, else filled.
        m2: Σ(x - mean)², filled unless ``frozen``.
        frozen: statistics are constants, so no gradient flows through them.
        count: values per channel behind the statistics, set by the forward pass.
    """

    channels_last: bool
    activation: Activation
    epsilon: float
    mean: Statistics
    inv_std: Statistics
    m2: Statistics
    frozen: bool = False
    count: int = 0

    @classmethod
    def over_batch(cls, channels: int, *, channels_last: bool, activation: Activation, epsilon: float) -> BatchNormCall:
        """A call that takes its statistics from the batch."""
        return cls(channels_last, activation, epsilon, np.zeros(channels), np.zeros(channels), np.zeros(channels))

    @classmethod
    def with_constants(
        cls,
        mean: paddle.Tensor,
        variance: paddle.Tensor,
        *,
        channels_last: bool,
        activation: Activation,
        epsilon: float,
    ) -> BatchNormCall:
        """A call that takes its statistics from the moving ones, as constants."""
        mean64, variance64 = running_statistics(mean, variance)
        inv_std = 1.0 / np.sqrt(variance64 + epsilon)
        return cls(channels_last, activation, epsilon, mean64, inv_std, np.empty(0), frozen=True)


@dataclass
class GroupNormCall:
    """One call of group norm; instance norm is the one with as many groups as channels.

    Attributes:
        groups, channels_last, activation, epsilon: the layer's settings.
        mean, m2, inv_std: float64, one per sample and group, filled by the forward pass.
    """

    groups: int
    channels_last: bool
    activation: Activation
    epsilon: float
    mean: Statistics
    m2: Statistics
    inv_std: Statistics

    @classmethod
    def over_samples(
        cls, samples: int, *, groups: int, channels_last: bool, activation: Activation, epsilon: float
    ) -> GroupNormCall:
        """A call with room for the statistics of ``samples`` samples."""
        size = samples * groups
        return cls(groups, channels_last, activation, epsilon, np.zeros(size), np.zeros(size), np.zeros(size))


def batch_norm(
    x: paddle.Tensor,
    weight: paddle.Tensor | None,
    bias: paddle.Tensor | None,
    residual: paddle.Tensor | None,
    call: BatchNormCall,
) -> paddle.Tensor:
    """``act(γ·x̂ + β + residual)``, differentiable in every tensor. ``call`` receives the statistics."""
    return _BatchNorm.apply(x, weight, bias, residual, call)


def group_norm(
    x: paddle.Tensor,
    weight: paddle.Tensor | None,
    bias: paddle.Tensor | None,
    residual: paddle.Tensor | None,
    call: GroupNormCall,
) -> paddle.Tensor:
    """``act(γ·x̂ + β + residual)`` with statistics per sample and group, differentiable in every tensor."""
    return _GroupNorm.apply(x, weight, bias, residual, call)


def running_statistics(mean: paddle.Tensor, variance: paddle.Tensor) -> tuple[Statistics, Statistics]:
    """The moving statistics of a layer as float64 arrays of their own."""
    return mean.numpy().astype(np.float64), variance.numpy().astype(np.float64)


def update_running(mean: paddle.Tensor, variance: paddle.Tensor, call: BatchNormCall, momentum: float) -> None:
    """``moving = momentum · moving + (1 - momentum) · batch``, in the memory of the layer's buffers.

    The batch variance is the biased one, as in Paddle's own CPU kernels.
    """
    kernels.update_running(
        _vector(mean),
        _vector(variance),
        mean=call.mean,
        m2=call.m2,
        count=call.count,
        momentum=momentum,
        unbiased=False,
    )


class _Norm(PyLayer):
    """What both norms share: which tensors are kept, and in which order gradients are returned."""

    @staticmethod
    def keep(ctx, call, x, weight, bias, residual):
        tensors = (x, weight, bias, residual)
        ctx.call = call
        ctx.given = [tensor is not None for tensor in tensors]
        # Asked now: a tensor that comes back from a hook (recompute, offloading) has forgotten it.
        ctx.needed = [tensor is not None and not tensor.stop_gradient for tensor in tensors]
        ctx.save_for_backward(*[tensor for tensor in tensors if tensor is not None])

    @staticmethod
    def kept(ctx):
        saved = iter(ctx.saved_tensor())
        return [next(saved) if given else None for given in ctx.given]

    @staticmethod
    def gradients(ctx, dy, launch):
        """Gradients for the tensors that forward was given, None where a tensor needs none.

        ``launch(dy, x, dx, dresidual, sum_dz, sum_dz_xhat, weight, bias, residual)`` runs the kernel.
        """
        tensors = _Norm.kept(ctx)
        x, weight, bias, residual = tensors
        call = ctx.call
        needed = [need and asked for need, asked in zip(ctx.needed, asked_for(tensors), strict=True)]
        if paddle.is_grad_enabled():
            # A gradient that will itself be differentiated has to consist of Paddle's operators.
            found = composite_gradients(dy, x, weight, bias, residual, call)
            return _Norm.in_order(ctx, found, needed)
        x, dy = x.contiguous(), dy.contiguous()
        residual = None if residual is None else residual.contiguous()
        dx = paddle.empty_like(x) if needed[0] else None
        dresidual = paddle.empty_like(x) if needed[3] else None
        channels = x.shape[-1 if call.channels_last else 1]
        sum_dz, sum_dz_xhat = np.zeros(channels), np.zeros(channels)
        launch(
            _buffer(dy, call),
            _buffer(x, call),
            _buffer(dx, call),
            _buffer(dresidual, call),
            sum_dz=sum_dz,
            sum_dz_xhat=sum_dz_xhat,
            weight=_vector(weight),
            bias=_vector(bias),
            residual=_buffer(residual, call),
            activation=call.activation,
        )
        dweight = _stored(sum_dz_xhat, weight) if needed[1] else None
        dbias = _stored(sum_dz, bias) if needed[2] else None
        return _Norm.in_order(ctx, (dx, dweight, dbias, dresidual), needed)

    @staticmethod
    def in_order(ctx, gradients, needed):
        """One gradient for each tensor that forward was given, None for those that need none."""
        each = zip(gradients, ctx.given, needed, strict=True)
        return tuple(gradient if needed else None for gradient, given, needed in each if given)


class _BatchNorm(PyLayer):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, call):
        _Norm.keep(ctx, call, x, weight, bias, residual)
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        y = paddle.empty_like(x)
        settings = {
            "weight": _vector(weight),
            "bias": _vector(bias),
            "residual": _buffer(residual, call),
            "activation": call.activation,
        }
        source, target = _buffer(x, call), _buffer(y, call)
        if call.frozen:
            kernels.batch_normalize(source, target, mean=call.mean, inv_std=call.inv_std, **settings)
        else:
            call.count = kernels.batch_norm_forward(
                source, target, mean=call.mean, m2=call.m2, inv_std=call.inv_std, epsilon=call.epsilon, **settings
            )
        return y

    @staticmethod
    def backward(ctx, dy):
        call = ctx.call

        def launch(*buffers, **settings):
            kernels.batch_norm_backward(*buffers, mean=call.mean, inv_std=call.inv_std, frozen=call.frozen, **settings)

        return _Norm.gradients(ctx, dy, launch)


class _GroupNorm(PyLayer):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, call):
        _Norm.keep(ctx, call, x, weight, bias, residual)
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        y = paddle.empty_like(x)
        kernels.group_norm_forward(
            _buffer(x, call),
            _buffer(y, call),
            groups=call.groups,
            mean=call.mean,
            m2=call.m2,
            inv_std=call.inv_std,
            epsilon=call.epsilon,
            weight=_vector(weight),
            bias=_vector(bias),
            residual=_buffer(residual, call),
            activation=call.activation,
        )
        return y

    @staticmethod
    def backward(ctx, dy):
        call = ctx.call

        def launch(*buffers, **settings):
            kernels.group_norm_backward(*buffers, groups=call.groups, mean=call.mean, inv_std=call.inv_std, **settings)

        return _Norm.gradients(ctx, dy, launch)


def _buffer(tensor: paddle.Tensor | None, call: BatchNormCall | GroupNormCall) -> Buffer | None:
    if tensor is None:
        return None
    outer, *rest = tensor.shape
    channels = rest.pop() if call.channels_last else rest.pop(0)
    return Buffer(tensor.data_ptr(), _dtype(tensor), (outer, channels, prod(rest)), call.channels_last)


def _vector(tensor: paddle.Tensor | None) -> Vector | None:
    return None if tensor is None else Vector(tensor.data_ptr(), _dtype(tensor), tensor.shape[0])


def _dtype(tensor: paddle.Tensor) -> str:
    return str(tensor.dtype).removeprefix("paddle.")


def _stored(values: Statistics, like: paddle.Tensor) -> paddle.Tensor:
    gradient = paddle.empty_like(like)
    kernels.store(values, _vector(gradient))
    return gradient
