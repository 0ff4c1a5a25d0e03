"""Which gradients ``paddle.grad`` leaves out.

``paddle.grad(outputs, inputs)`` runs only the part of the graph that leads to ``inputs``. Operators of
Paddle's own are told; a ``PyLayer`` is not, and must guess: it has to return None for a tensor that
was left out, or Paddle raises. So a gradient penalty, which asks for the image's gradient and not for
γ's, would fail on any ``PyLayer`` that takes parameters. Here the question is answered from the graph.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Collection, Iterable
from functools import cache
from types import FrameType
from typing import Any

import paddle

__all__ = ["leads_to", "node_of", "targets_of_paddle_grad"]


def node_of(tensor: paddle.Tensor) -> Any:
    """The node of the graph that this tensor comes from, or that a leaf's gradient goes to; None if there is none.

    What ``tensor.grad_fn`` returns, but Paddle (3.3) counts a reference too many there, so that neither the node nor
    what it keeps would ever be freed. That one is given back here.
    """
    node = tensor.grad_fn
    if node is not None and _counts_too_many():
        _release(node)
    return node


def targets_of_paddle_grad() -> Collection[Any] | None:
    """What the running ``paddle.grad`` was asked for, as :func:`leads_to` takes it; None if none is running."""
    inputs = _inputs_of_paddle_grad()
    if inputs is None:
        return None
    return {_identity(node) for node in map(node_of, inputs) if node is not None}


def leads_to(node: Any, targets: Collection[Any]) -> bool:
    """Whether a gradient that comes to ``node`` goes on to one of the targets: the node itself, or one before it."""
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


def _identity(node: Any) -> Any:
    """The same for two handles of one node, should they be different Python objects."""
    return node.node_ptr()


_release = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_DecRef", ctypes.pythonapi))


@cache
def _counts_too_many() -> bool:
    """Whether ``grad_fn`` raises the count of references by more than the one that it returns."""
    with paddle.enable_grad():
        leaf = paddle.zeros([1])
        leaf.stop_gradient = False
        node = leaf.grad_fn
        before = sys.getrefcount(node)
        again = leaf.grad_fn
        return again is node and sys.getrefcount(node) - before > 1
