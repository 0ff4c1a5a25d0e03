"""The kernels as differentiable Paddle functions: raw memory on one side, autograd on the other.

Only plain dynamic mode comes here (:mod:`flatwater.paddle.backend` decides): a ``PyLayer`` that
reads raw memory inside a captured graph would lose its gradients without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, TypeAlias

import numpy as np
import paddle
from paddle.autograd import PyLayer
from paddle.jit.sot.psdb import fallback

from flatwater import kernels
from flatwater.kernels import Buffer, Statistics, Vector
from flatwater.paddle.composite import composite_gradients
from flatwater.paddle.pruning import asked_for
from flatwater.spec import Activation, NormSpec

__all__ = ["BatchNormCall", "GroupNormCall", "normalize", "running_statistics", "update_running"]


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

    def forward(self, x: Buffer, y: Buffer, **settings: Any) -> None:
        """Fill ``y``, and the statistics unless they are constants."""
        if self.frozen:
            kernels.batch_normalize(x, y, mean=self.mean, inv_std=self.inv_std, **settings)
            return
        self.count = kernels.batch_norm_forward(
            x, y, mean=self.mean, m2=self.m2, inv_std=self.inv_std, epsilon=self.epsilon, **settings
        )

    def backward(self, dy: Buffer, x: Buffer, dx: Buffer | None, dresidual: Buffer | None, **settings: Any) -> None:
        """Fill ``dx`` and ``dresidual``, where they are wanted, and the sums."""
        kernels.batch_norm_backward(
            dy, x, dx, dresidual, mean=self.mean, inv_std=self.inv_std, frozen=self.frozen, **settings
        )


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

    def forward(self, x: Buffer, y: Buffer, **settings: Any) -> None:
        """Fill ``y`` and the statistics."""
        kernels.group_norm_forward(
            x,
            y,
            groups=self.groups,
            mean=self.mean,
            m2=self.m2,
            inv_std=self.inv_std,
            epsilon=self.epsilon,
            **settings,
        )

    def backward(self, dy: Buffer, x: Buffer, dx: Buffer | None, dresidual: Buffer | None, **settings: Any) -> None:
        """Fill ``dx`` and ``dresidual``, where they are wanted, and the sums."""
        kernels.group_norm_backward(
            dy, x, dx, dresidual, groups=self.groups, mean=self.mean, inv_std=self.inv_std, **settings
        )


_Call: TypeAlias = BatchNormCall | GroupNormCall


def normalize(
    x: paddle.Tensor,
    weight: paddle.Tensor | None,
    bias: paddle.Tensor | None,
    residual: paddle.Tensor | None,
    call: BatchNormCall | GroupNormCall,
) -> paddle.Tensor:
    """``act(γ·x̂ + β + residual)``, differentiable in every tensor. ``call`` receives the statistics."""
    fallback(recursive=True)  # to_static(full_graph=False) runs what follows as it is, instead of looking into it
    return _Norm.apply(x, weight, bias, residual, call)


def running_statistics(mean: paddle.Tensor, variance: paddle.Tensor) -> tuple[Statistics, Statistics]:
    """The moving statistics of a layer as float64 arrays of their own."""
    return mean.numpy().astype(np.float64), variance.numpy().astype(np.float64)


def update_running(mean: paddle.Tensor, variance: paddle.Tensor, call: BatchNormCall, spec: NormSpec) -> None:
    """``moving = momentum · moving + (1 - momentum) · batch``, in the memory of the layer's buffers."""
    kernels.update_running(
        _vector(mean),
        _vector(variance),
        mean=call.mean,
        m2=call.m2,
        count=call.count,
        momentum=spec.momentum,
        unbiased=spec.unbiased,
    )


class _Norm(PyLayer):
    @staticmethod
    def forward(
        ctx: Any,
        x: paddle.Tensor,
        weight: paddle.Tensor | None,
        bias: paddle.Tensor | None,
        residual: paddle.Tensor | None,
        call: _Call,
    ) -> paddle.Tensor:
        tensors = (x, weight, bias, residual)
        ctx.call = call
        ctx.given = [tensor is not None for tensor in tensors]
        # Asked now: a tensor that comes back from a hook (recompute, offloading) has forgotten it.
        ctx.needed = [tensor is not None and not tensor.stop_gradient for tensor in tensors]
        ctx.save_for_backward(*[tensor for tensor in tensors if tensor is not None])

        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        y = paddle.empty_like(x)
        call.forward(_buffer(x, call), _buffer(y, call), **_settings(weight, bias, residual, call))
        return y

    @staticmethod
    def backward(ctx: Any, dy: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        saved = iter(ctx.saved_tensor())
        tensors: list[Any] = [next(saved) if given else None for given in ctx.given]
        needed = [need and asked for need, asked in zip(ctx.needed, asked_for(tensors), strict=True)]
        # A gradient that will itself be differentiated has to consist of Paddle's operators.
        differentiate = composite_gradients if paddle.is_grad_enabled() else partial(_kernel_gradients, needed)
        found = differentiate(dy, tensors, ctx.call)
        each = zip(found, ctx.given, needed, strict=True)
        return tuple(gradient if need else None for gradient, given, need in each if given)


def _kernel_gradients(
    needed: list[bool], dy: paddle.Tensor, tensors: list[Any], call: _Call
) -> tuple[paddle.Tensor | None, ...]:
    """The gradients for x, γ, β and the residual that are ``needed``, None for the others."""
    x, weight, bias, residual = tensors
    x, dy = x.contiguous(), dy.contiguous()
    residual = None if residual is None else residual.contiguous()
    dx = paddle.empty_like(x) if needed[0] else None
    dresidual = paddle.empty_like(x) if needed[3] else None
    channels = x.shape[-1 if call.channels_last else 1]
    sum_dz, sum_dz_xhat = np.zeros(channels), np.zeros(channels)
    call.backward(
        _buffer(dy, call),
        _buffer(x, call),
        None if dx is None else _buffer(dx, call),
        None if dresidual is None else _buffer(dresidual, call),
        sum_dz=sum_dz,
        sum_dz_xhat=sum_dz_xhat,
        **_settings(weight, bias, residual, call),
    )
    dweight = _stored(sum_dz_xhat, weight) if needed[1] else None
    dbias = _stored(sum_dz, bias) if needed[2] else None
    return dx, dweight, dbias, dresidual


def _settings(
    weight: paddle.Tensor | None, bias: paddle.Tensor | None, residual: paddle.Tensor | None, call: _Call
) -> dict[str, Any]:
    return {
        "weight": None if weight is None else _vector(weight),
        "bias": None if bias is None else _vector(bias),
        "residual": None if residual is None else _buffer(residual, call),
        "activation": call.activation,
    }


def _buffer(tensor: paddle.Tensor, call: _Call) -> Buffer:
    outer, *rest = tensor.shape
    channels = rest.pop() if call.channels_last else rest.pop(0)
    return Buffer(tensor.data_ptr(), _dtype(tensor), (outer, channels, prod(rest)), call.channels_last)


def _vector(tensor: paddle.Tensor) -> Vector:
    return Vector(tensor.data_ptr(), _dtype(tensor), tensor.shape[0])


def _dtype(tensor: paddle.Tensor) -> str:
    return str(tensor.dtype).removeprefix("paddle.")


def _stored(values: Statistics, like: paddle.Tensor) -> paddle.Tensor:
    gradient = paddle.empty_like(like)
    kernels.store(values, _vector(gradient))
    return gradient
