"""The kernels as differentiable Paddle functions: raw memory on one side, autograd on the other.

Only plain dynamic mode comes here (:mod:`flatwater.paddle.backend` decides): a ``PyLayer`` that
reads raw memory inside a captured graph would lose its gradients without a word.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import paddle
from paddle.autograd import PyLayer
from paddle.jit.sot.psdb import fallback

from flatwater.paddle.calls import NormCall
from flatwater.paddle.composite import composite_gradients
from flatwater.paddle.memory import empty_like
from flatwater.paddle.pruning import asked_for

__all__ = ["normalize"]


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
        call.forward(x, y, weight, bias, residual)
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
    dx, dweight, dbias, dresidual = (
        empty_like(like) if need else None for like, need in zip((x, weight, bias, x), needed, strict=True)
    )
    call.backward(dy, x, residual, dx, dresidual, dweight, dbias)
    return dx, dweight, dbias, dresidual
