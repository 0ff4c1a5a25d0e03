"""Which layer of an exported program is the first to compute something else than the live model."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import paddle

from flatwater.paddle.running import flatten, layers_of
from flatwater.verify import Arrays, difference

__all__ = ["first_divergence", "probing"]


@contextlib.contextmanager
def probing(model: paddle.nn.Layer, left_out: Collection[str] = ()) -> Iterator[list[str]]:
    """Inside, the model returns what each of its innermost layers wrote, in running order, and then its outputs.

    The hooks that do it fire while a program is captured (``jit.save(..., with_hook=True)``), so the exported
    program returns the same tensors.

    Args:
        left_out: paths of layers that are not reported.

    Yields:
        A list that each run fills anew with the path and class of the layer that wrote each tensor.
    """
    names: list[str] = []
    tensors: list[Any] = []

    def begin(_: paddle.nn.Layer, inputs: Any) -> None:
        names.clear()
        tensors.clear()

    def note(path: str) -> Any:
        def hook(layer: paddle.nn.Layer, _: Any, output: Any) -> None:
            found = flatten(output)
            tensors.extend(found)
            names.extend([f"{path} ({type(layer).__name__})"] * len(found))

        return hook

    def end(_: paddle.nn.Layer, inputs: Any, output: Any) -> list[Any]:
        # An exported program returns no tensor twice, so neither is one that is an output already.
        writers = {id(tensor): name for name, tensor in zip(reversed(names), reversed(tensors), strict=True)}
        outputs = flatten(output)
        results = {id(tensor): tensor for tensor in (*outputs, *tensors)}
        running_order = [*list(results)[len(outputs) :], *list(results)[: len(outputs)]]
        names[:] = [writers.get(key, "the output, outside any layer") for key in running_order]
        return [results[key] for key in running_order]

    with contextlib.ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(begin).remove)
        for path, layer in layers_of(model):
            if not layer._sub_layers and path not in left_out and layer is not model:
                hooks.callback(layer.register_forward_post_hook(note(path)).remove)
        hooks.callback(model.register_forward_post_hook(end).remove)
        yield names


def first_divergence(names: Sequence[str], expected: Arrays, actual: Arrays, tolerance: float) -> str | None:
    """The first of ``names`` whose tensor is further off than ``tolerance``; None if there is none, or no telling.

    ``expected`` and ``actual`` are what a probed model and its program returned.
    """
    if not len(names) == len(expected) == len(actual):
        return None
    for name, one, two in zip(names, expected, actual, strict=True):
        if difference(one, two).max_rel > tolerance:
            return name
    return None
