"""What a norm keeps from its forward pass for its backward pass: only what the gradients are computed from.

Beside x, γ and β, and only where there is a residual:

========================  =======================================================================
``none``                  nothing, for dz = dy
``relu``, ``relu6``,      y, in whose dtype z is compared with the kinks, as Paddle's own activations do:
``leaky_relu``            the next operator is likely to keep it as well, and Paddle's activation does
``hardswish``, ``swish``  the residual, without which z cannot be computed again
========================  =======================================================================

Operators of Paddle's own notice if a tensor that they keep is modified in place before the backward pass; for a
``PyLayer`` nobody does. So it is done here, by the same count of in-place operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import paddle

from flatwater.errors import InputError
from flatwater.paddle.pruning import leads_to, node_of, targets_of_paddle_grad
from flatwater.spec import SLOPE_IN_OUTPUT, Activation

__all__ = ["Saved", "recall", "save", "wanted"]


class Saved(NamedTuple):
    """The tensors of a backward pass, None for what there is not or what it does without."""

    x: Any
    weight: Any
    bias: Any
    residual: Any
    y: Any


_WORDS = Saved("the input", "the weight", "the bias", "the residual", "the output")


def save(ctx: Any, inputs: Sequence[paddle.Tensor | None], y: paddle.Tensor, activation: Activation) -> None:
    """At the end of a forward pass on ``inputs``, x, γ, β and the residual, keep what its backward pass needs."""
    x, weight, bias, residual = inputs
    ctx.given = [tensor is not None for tensor in inputs]
    # Asked now: a tensor that comes back from a hook (recompute, offloading) has forgotten it.
    ctx.needed = [tensor is not None and not tensor.stop_gradient for tensor in inputs]
    ctx.residual_node = None
    kept = Saved(x, weight, bias, None, None)
    if residual is not None and activation in SLOPE_IN_OUTPUT:
        ctx.residual_node = node_of(residual)
        if activation != "none":
            # A tensor of the same memory: y itself leads to the graph, and that to ctx, and none would ever be freed.
            kept = kept._replace(y=y.detach())
    elif residual is not None:
        kept = kept._replace(residual=residual)
    ctx.kept = [tensor is not None for tensor in kept]
    ctx.versions = [None if tensor is None else (weakref.ref(tensor), tensor.inplace_version) for tensor in kept]
    ctx.save_for_backward(*[tensor for tensor in kept if tensor is not None])


def recall(ctx: Any, *, parameters: bool) -> Saved:
    """At the beginning of the backward pass, what :func:`save` has kept.

    Args:
        parameters: whether the values of γ and β are going to be read.

    Raises:
        InputError: the values of a tensor that is going to be read are not those of the forward pass.
    """
    tensors = iter(ctx.saved_tensor())
    saved = Saved(*(next(tensors) if kept else None for kept in ctx.kept))
    read = saved if parameters else saved._replace(weight=None, bias=None)
    for words, tensor, version in zip(_WORDS, read, ctx.versions, strict=True):
        # What a hook has made anew counts from its own beginning.
        if tensor is not None and version[0]() is tensor and tensor.inplace_version != version[1]:
            raise InputError(
                f"{words} of a norm layer, from which its gradient is computed, has been modified by an in-place "
                f"operation: it is at version {tensor.inplace_version} instead of {version[1]}; "
                "modify a copy, or use the operation that is not in place"
            )
    return saved


def wanted(ctx: Any) -> list[bool]:
    """Which of the gradients for x, γ, β and the residual the running backward pass has a use for.

    All that are needed in ``loss.backward()``; in ``paddle.grad`` those for what was asked for, and for whatever was
    computed from that.
    """
    needed: list[bool] = ctx.needed
    targets = targets_of_paddle_grad()
    if targets is None:
        return needed
    # What a hook has made anew knows nothing of the graph: asked is the tensor of the forward pass, if it still exists.
    *tensors, _ = (None if version is None else version[0]() for version in ctx.versions)
    nodes = [None if tensor is None else node_of(tensor) for tensor in tensors]
    nodes[-1] = ctx.residual_node or nodes[-1]
    return [need and (node is None or leads_to(node, targets)) for need, node in zip(needed, nodes, strict=True)]
