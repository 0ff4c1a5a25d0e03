"""The kernels as differentiable Paddle functions: raw memory on one side, autograd on the other.

Only plain dynamic mode comes here (:mod:`flatwater.paddle.backend` decides): a ``PyLayer`` that
reads raw memory inside a captured graph would lose its gradients without a word.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import numpy as np
import paddle
from paddle.autograd import PyLayer
from paddle.jit.sot.psdb import fallback

from flatwater import kernels
from flatwater.errors import InputError
from flatwater.kernels import Buffer, Statistics, Vector
from flatwater.paddle.calls import BatchNormCall, NormCall
from flatwater.paddle.composite import composite_gradients
from flatwater.paddle.dtypes import dtype_name
from flatwater.paddle.memory import empty_like
from flatwater.paddle.pruning import asked_for
from flatwater.spec import NormSpec

__all__ = ["normalize", "update_running"]


def normalize(
    x: paddle.Tensor,
    weight: paddle.Tensor | None,
    bias: paddle.Tensor | None,
    residual: paddle.Tensor | None,
    call: NormCall,
) -> paddle.Tensor:
    """``act(γ·x̂ + β + residual)``, differentiable in every tensor. ``call`` receives the statistics."""
    fallback(recursive=True)  # to_static(full_graph=False) runs what follows as it is, instead of looking into it
    return _Norm.apply(x, weight, bias, residual, call)


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
        call: NormCall,
    ) -> paddle.Tensor:
        tensors = (x, weight, bias, residual)
        ctx.call = call
        ctx.given = [tensor is not None for tensor in tensors]
        # Asked now: a tensor that comes back from a hook (recompute, offloading) has forgotten it.
        ctx.needed = [tensor is not None and not tensor.stop_gradient for tensor in tensors]
        ctx.save_for_backward(*[tensor for tensor in tensors if tensor is not None])

        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        y = empty_like(x)
        memory = _Memory(x, call)
        call.forward(memory.of(x), memory.of(y), **_parameters(weight, bias), residual=memory.of(residual))
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
    needed: list[bool], dy: paddle.Tensor, tensors: list[Any], call: NormCall
) -> tuple[paddle.Tensor | None, ...]:
    """The gradients for x, γ, β and the residual that are ``needed``, None for the others."""
    x, weight, bias, residual = tensors
    x, dy = x.contiguous(), dy.contiguous()
    residual = None if residual is None else residual.contiguous()
    dx = empty_like(x) if needed[0] else None
    dresidual = empty_like(x) if needed[3] else None
    memory = _Memory(x, call)
    sum_dz, sum_dz_xhat = np.zeros(memory.channels), np.zeros(memory.channels)
    call.backward(
        memory.of(dy),
        memory.of(x),
        memory.of(dx),
        memory.of(dresidual),
        sum_dz=sum_dz,
        sum_dz_xhat=sum_dz_xhat,
        **_parameters(weight, bias),
        residual=memory.of(residual),
    )
    dweight = _stored(sum_dz_xhat, weight) if needed[1] else None
    dbias = _stored(sum_dz, bias) if needed[2] else None
    return dx, dweight, dbias, dresidual


class _Memory:
    """How the kernels see x, and every other dense tensor that is like it."""

    def __init__(self, x: paddle.Tensor, call: NormCall) -> None:
        outer, *rest = x.shape
        self.channels = rest.pop() if call.channels_last else rest.pop(0)
        self._like = (x.shape, x.dtype)
        self._rest = (dtype_name(x), (outer, self.channels, prod(rest)), call.channels_last)

    def of(self, tensor: paddle.Tensor | None) -> Buffer | None:
        if tensor is None:
            return None
        if (tensor.shape, tensor.dtype) != self._like:
            shape, dtype = self._like
            raise InputError(
                f"a {tensor.dtype} tensor of shape {list(tensor.shape)} came to a norm layer whose input is {dtype} of "
                f"shape {list(shape)}; let the hook that made it keep both"
            )
        return Buffer(tensor.data_ptr(), *self._rest)


def _parameters(weight: paddle.Tensor | None, bias: paddle.Tensor | None) -> dict[str, Vector | None]:
    return {
        "weight": None if weight is None else _vector(weight),
        "bias": None if bias is None else _vector(bias),
    }


def _vector(tensor: paddle.Tensor) -> Vector:
    return Vector(tensor.data_ptr(), dtype_name(tensor), tensor.shape[0])


def _stored(values: Statistics, like: paddle.Tensor) -> paddle.Tensor:
    gradient = empty_like(like)
    kernels.store(values, _vector(gradient))
    return gradient
