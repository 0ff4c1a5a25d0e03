"""Where residual blocks end: what a policy has to know of a model and cannot read off its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import paddle

from flatwater.errors import SurgeryError
from flatwater.paddle.pruning import node_of
from flatwater.paddle.running import Inputs, evaluating, flatten, map_tensors, untouched
from flatwater.verify import one_line

__all__ = ["block_ends"]

# Nodes that cut tensors up. Two pieces of one tensor are no shortcut around each other (Res2Net adds such), and the
# graph does not tell the pieces of a split apart.
_CUTS = ("Split", "Slice", "StridedSlice", "Unbind")


def block_ends(model: paddle.nn.Layer, norms: Mapping[str, Any], inputs: Inputs) -> set[str]:
    """Paths of the norms that end a residual block, seen in ``eval()``; nothing of the model is different afterwards.

    A norm ends a residual block if what it writes, activated perhaps, is added to what the block read: to one of the
    tensors that its own value was computed from, or to a projection of that with at most one norm, and fewer than the
    branch itself has. A norm of ours to which the residual is handed ends its block as well.

    Raises:
        SurgeryError: the model does not run on the inputs.
    """
    ends: set[str] = set()
    writers: dict[Any, str] = {}

    def hook(path: str) -> Callable[..., None]:
        def note(_: paddle.nn.Layer, args: tuple[Any, ...], output: Any) -> None:
            if len(args) > 1 and isinstance(args[1], paddle.Tensor):
                ends.add(path)
            elif (node := node_of(output)) is not None:
                writers[node] = path

        return note

    with contextlib.ExitStack() as stack:
        for context in (untouched(model), evaluating(model), paddle.enable_grad()):
            stack.enter_context(context)
        args, kwargs = map_tensors(inputs.args, _traced), map_tensors(inputs.kwargs, _traced)
        for path, layer in norms.items():
            stack.callback(layer.register_forward_post_hook(hook(path)).remove)
        try:
            outputs = flatten(model(*args, **kwargs))
        except Exception as error:
            raise SurgeryError(
                f"{type(model).__name__} does not run on the inputs: {one_line(error)}; "
                "give what you would call it with"
            ) from error
    return ends | _block_ends([node_of(tensor) for tensor in outputs], writers)


def _traced(value: Any) -> Any:
    """Of a tensor, one with which a graph begins, though every parameter may be frozen."""
    if not isinstance(value, paddle.Tensor):
        return value
    copy = value.detach()
    copy.stop_gradient = not copy.is_floating_point()
    return copy.clone()  # not a leaf, which nothing may change in place


def _block_ends(roots: list[Any], writers: Mapping[Any, str]) -> set[str]:
    parents = _graph(roots)
    ends = set()
    for node, addends in parents.items():
        if not node.name().startswith(("AddGradNode", "AddNGradNode")) or len(addends) < 2:
            continue
        pasts = [_past(parents, addend) for addend in addends]
        for index, addend in enumerate(addends):
            others = [past for other, past in enumerate(pasts) if other != index]
            cut = any(other.name().startswith(_CUTS) for other in addends)
            if addend in writers and not cut and all(_is_shortcut(pasts[index], past, writers) for past in others):
                ends.add(writers[addend])
    return ends


def _is_shortcut(branch: set[Any], other: set[Any], writers: Mapping[Any, str]) -> bool:
    """Whether the other addend goes around the branch, by the nodes from which each was computed."""
    around, through = (sum(node in writers for node in nodes) for nodes in (other - branch, branch - other))
    cut = any(node.name().startswith(_CUTS) for node in other - branch)
    return bool(branch & other) and around <= 1 and through > around and not cut


def _graph(roots: list[Any]) -> dict[Any, list[Any]]:
    """Each node of the autograd graph, and those from which its operands come."""
    parents: dict[Any, list[Any]] = {}
    waiting = [root for root in roots if root is not None]
    while waiting:
        node = waiting.pop()
        if node not in parents:
            parents[node] = [parent for parent in node.next_functions if parent is not None]
            waiting += parents[node]
    return parents


def _past(parents: Mapping[Any, list[Any]], node: Any) -> set[Any]:
    past: set[Any] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in past:
            past.add(one)
            waiting += parents[one]
    return past
