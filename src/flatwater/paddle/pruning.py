"""Which gradients ``paddle.grad`` leaves out.

``paddle.grad(outputs, inputs)`` runs only the part of the graph that leads to ``inputs``. Operators of
Paddle's own are told; a ``PyLayer`` is not, and must guess: it has to return None for a tensor that
was left out, or Paddle raises. So a gradient penalty, which asks for the image's gradient and not for
γ's, would fail on any ``PyLayer`` that takes parameters. Here the question is answered from the graph.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

import paddle

__all__ = ["asked_for"]


def asked_for(tensors: list[paddle.Tensor | None]) -> list[bool]:
    """For each tensor that a running backward pass has come to: whether its gradient leads anywhere.

    Always true in ``loss.backward()``. In ``paddle.grad`` true for what was asked for, and for
    whatever was computed from that.
    """
    inputs = _inputs_of_paddle_grad()
    if inputs is None:
        return [True] * len(tensors)
    targets = {_identity(tensor.grad_fn) for tensor in inputs if tensor.grad_fn is not None}
    return [tensor is not None and _leads_to(tensor.grad_fn, targets) for tensor in tensors]


def _inputs_of_paddle_grad() -> list[paddle.Tensor] | None:
    """What the ``paddle.grad`` that is running was asked for; None if none is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "grad" and code.co_filename.endswith("dygraph/base.py"):
            inputs = frame.f_locals["inputs"]
            return list(inputs) if isinstance(inputs, Iterable) and not hasattr(inputs, "grad_fn") else [inputs]
        frame = frame.f_back
    return None


def _leads_to(node: Any, targets: set[Any]) -> bool:
    seen: set[Any] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is None or _identity(node) in seen:
            continue
        if _identity(node) in targets:
            return True
        seen.add(_identity(node))
        waiting.extend(node.next_functions)
    return False


def _identity(node: Any) -> Any:
    """The same for two handles of one node, which are different Python objects."""
    return node.node_ptr()
