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
from flatwater.paddle.saved import Saved, recall, save, wanted

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
        ctx.call = call
        dense = x.contiguous()
        y = empty_like(dense)
        call.forward(dense, y, weight, bias, None if residual is None else residual.contiguous())
        save(ctx, (x, weight, bias, residual), y, call.activation)
        return y

    @staticmethod
    def backward(ctx: Any, dy: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        # A gradient that will itself be differentiated has to consist of Paddle's operators. The kernels have γ and β
        # of the forward pass.
        composite = paddle.is_grad_enabled()
        saved = recall(ctx, parameters=composite)
        needed = wanted(ctx)
        differentiate = composite_gradients if composite else partial(_kernel_gradients, needed)
        found = differentiate(dy, saved, ctx.call)
        each = zip(found, ctx.given, needed, strict=True)
        return tuple(gradient if need else None for gradient, given, need in each if given)


def _kernel_gradients(
    needed: list[bool], dy: paddle.Tensor, saved: Saved, call: NormCall
) -> tuple[paddle.Tensor | None, ...]:
    """The gradients for x, γ, β and the residual that are ``needed``, None for the others."""
    x, dy = saved.x.contiguous(), dy.contiguous()
    residual, y = (None if tensor is None else tensor.contiguous() for tensor in (saved.residual, saved.y))
    # The residual's gradient is a tensor of its own without an activation too, where it is dy: Paddle adds to gradients
    # in place, and would add to whatever else holds dy.
    dx, dweight, dbias, dresidual = (
        empty_like(like) if need else None for like, need in zip((x, saved.weight, saved.bias, x), needed, strict=True)
    )
    call.backward(dy, x, residual, y, dx, dresidual, dweight, dbias)
    return dx, dweight, dbias, dresidual
