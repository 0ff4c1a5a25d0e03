"""What the layers of the live model write, to say which of them an exported program computes otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy.typing as npt
import paddle

from flatwater.paddle.kinds import BATCH_NORMS, SAMPLE_NORMS
from flatwater.paddle.running import Inputs, flatten, layers_of, to_numpy
from flatwater.paddle.shipping.forms import live_form
from flatwater.verify import Arrays, Look, Written, difference

__all__ = ["first_divergence", "look_at", "probing"]

_Array: TypeAlias = npt.NDArray[Any]


@contextlib.contextmanager
def probing(model: paddle.nn.Layer, paths: Collection[str]) -> Iterator[list[str]]:
    """Inside, the model returns what each of the layers at ``paths`` wrote, in running order, and then its outputs.

    The hooks that do it fire while a program is captured (``jit.save(..., with_hook=True)``), so the exported
    program returns the same tensors, each of them once.

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
            for tensor in flatten(output):
                again = sum(name.startswith(f"{path} ({type(layer).__name__}") for name in names)
                names.append(f"{path} ({type(layer).__name__}{f', again {again}' if again else ''})")
                tensors.append(tensor)

        return hook

    def end(_: paddle.nn.Layer, inputs: Any, output: Any) -> list[Any]:
        outputs = flatten(output)
        names.extend(f"output {index}, outside any layer" for index in range(len(outputs)))
        tensors.extend(outputs)
        if not paddle.in_dynamic_mode():
            # A program returns no tensor twice: each goes under the name of the layer that wrote it first.
            first = {id(tensor): index for index, tensor in reversed(list(enumerate(tensors)))}
            kept = sorted(first.values())
            names[:] = [names[index] for index in kept]
            tensors[:] = [tensors[index] for index in kept]
        return list(tensors)

    with contextlib.ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(begin).remove)
        for path, layer in layers_of(model):
            if path in paths and layer is not model:
                hooks.callback(layer.register_forward_post_hook(note(path)).remove)
        hooks.callback(model.register_forward_post_hook(end).remove)
        yield names


def first_divergence(
    expected: Mapping[str, _Array], names: Sequence[str], actual: Arrays, tolerance: float
) -> str | None:
    """The first of a probed program's ``names`` whose tensor is further off than ``tolerance``.

    None if there is none, or if the live model wrote nothing of that name.
    """
    for name, array in zip(names, actual, strict=True):
        if name in expected and difference(expected[name], array).max_rel > tolerance:
            return name
    return None


def look_at(model: paddle.nn.Layer, inputs: Inputs) -> Look:
    """What shows the norm layers of a model at work, called as ``inputs`` are, in whatever mode it is."""
    labels = {path: f"{path} ({type(layer).__name__})" for path, layer in layers_of(model)}

    def look(arrays: Arrays) -> list[Written]:
        found: list[Written] = []
        # By identity: what is kept alive keeps its own.
        alive: dict[int, tuple[paddle.Tensor, Written]] = {}

        def note(path: str) -> Any:
            def hook(layer: paddle.nn.Layer, args: Any, output: Any) -> None:
                for tensor in flatten(args):
                    if id(tensor) in alive:
                        alive[id(tensor)][1].read_by.extend(map(to_numpy, flatten(output)))
                if isinstance(layer, (*BATCH_NORMS, *SAMPLE_NORMS)):
                    for tensor in flatten(output):
                        found.append(Written(labels[path], to_numpy(tensor), []))
                        alive[id(tensor)] = tensor, found[-1]

            return hook

        with contextlib.ExitStack() as hooks:
            for path, layer in layers_of(model):
                if not layer._sub_layers:
                    hooks.callback(layer.register_forward_post_hook(note(path)).remove)
            live_form(model, inputs)(arrays)
        return found

    return look
