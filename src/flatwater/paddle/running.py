"""Running a model on example inputs so that nothing of it, and nothing around it, is different afterwards."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
import paddle.nn.functional as F

from flatwater.errors import InputError, SurgeryError

__all__ = [
    "Inputs",
    "SyncBatchNormOnCPU",
    "as_inputs",
    "called",
    "evaluating",
    "fixed_randomness",
    "flatten",
    "layers_of",
    "map_tensors",
    "parameter_dtype",
    "run",
    "run_to_arrays",
    "to_numpy",
    "undisturbed",
    "untouched",
]


_NUMBERS = (bool, int, float, np.number, np.bool_, type(None))


class Inputs:
    """Example inputs, as the arguments with which a model is called: tensors, or what :func:`as_inputs` nests."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs

    def arrays(self) -> list[npt.NDArray[Any]]:
        """All tensors in order, as NumPy arrays."""
        return [to_numpy(tensor) for tensor in (*self.args, *self.kwargs.values())]


def as_inputs(inputs: Any, *, nested: bool = False) -> Inputs:
    """A tensor or array, a list or tuple of them (arguments in order), or a dict (arguments by name).

    Args:
        nested: whether an argument may be a dict, list or tuple of tensors, a number (NumPy's too) or None, for callers
            that only run the model.

    Raises:
        InputError: there is none, or something that is neither a tensor nor an array.
    """
    convert = _nest if nested else _tensor
    if isinstance(inputs, Mapping):
        converted = Inputs((), {str(name): convert(value) for name, value in inputs.items()})
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str):
        converted = Inputs(tuple(convert(value) for value in inputs), {})
    else:
        converted = Inputs((_tensor(inputs),), {})
    if not flatten([*converted.args, *converted.kwargs.values()]):
        raise InputError("the example inputs are empty; give what you would call the model with")
    return converted


def map_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with each tensor, or whatever is no dict, list or tuple, changed."""
    if isinstance(value, Mapping):
        return {name: map_tensors(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(item, change) for item in value]
        if isinstance(value, list):
            return items
        return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
    return change(value)


def _nest(value: Any) -> Any:
    return map_tensors(value, lambda item: item if isinstance(item, _NUMBERS) else _tensor(item))


def _tensor(value: Any) -> paddle.Tensor:
    if isinstance(value, paddle.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return paddle.to_tensor(value)
    raise InputError(
        f"an example input is a {type(value).__name__}; give a paddle.Tensor, a NumPy array, or a list or dict of them"
    )


def layers_of(model: paddle.nn.Layer) -> list[tuple[str, paddle.nn.Layer]]:
    """Every layer once, by the first of its paths; the model itself is ``""``.

    Raises:
        SurgeryError: not a ``paddle.nn.Layer``.
    """
    if not isinstance(model, paddle.nn.Layer):
        hint = "its network is model.network" if isinstance(model, paddle.Model) else "give a paddle.nn.Layer"
        raise SurgeryError(f"a {type(model).__name__} is not a paddle.nn.Layer; {hint}")
    return list(model.named_sublayers(include_self=True))


def flatten(value: Any) -> list[paddle.Tensor]:
    """The tensors in nested lists, tuples and dicts; dicts by sorted key, as an exported program returns them.

    Tensors of a graph that is being captured count too.
    """
    if isinstance(value, paddle.Tensor | paddle.pir.Value):
        return [value]
    if isinstance(value, Mapping):
        value = [value[key] for key in _ordered(value)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in flatten(item)]
    return []


def run_to_arrays(model: paddle.nn.Layer, inputs: Inputs) -> list[npt.NDArray[Any]]:
    """As :func:`run`, and everything that can be compared: tensors, arrays and numbers, in whatever holds them."""
    with paddle.no_grad(), fixed_randomness():
        return list(_comparable(called(model, inputs), set()))


def _comparable(value: Any, seen: set[int]) -> Iterator[npt.NDArray[Any]]:
    if isinstance(value, paddle.Tensor):
        yield to_numpy(value)
    elif isinstance(value, np.ndarray | np.generic | bool | int | float):
        array = np.array(value)
        if array.dtype.kind in "biuf":
            yield array
    elif id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, Mapping):
            held: Any = [value[key] for key in _ordered(value)]
        elif isinstance(value, list | tuple | set | frozenset):
            held = value
        else:  # an object of the model's own, but not the model itself, a class or a function
            opaque = callable(value) or isinstance(value, ModuleType)
            held = () if opaque else getattr(value, "__dict__", {}).values()
        for item in held:
            yield from _comparable(item, seen)


def called(model: paddle.nn.Layer, inputs: Inputs) -> Any:
    """What the model makes of copies: one that works in place does not see its own changes the next time."""
    args, kwargs = (map_tensors(one, _copied) for one in (inputs.args, inputs.kwargs))
    return model(*args, **kwargs)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, paddle.Tensor) else value


def _ordered(value: Mapping[Any, Any]) -> list[Any]:
    """The keys, sorted where they can be."""
    try:
        return sorted(value)
    except TypeError:
        return sorted(value, key=str)


def to_numpy(tensor: paddle.Tensor) -> npt.NDArray[Any]:
    """A copy of its values; bfloat16, which NumPy lacks, as float32."""
    tensor = tensor.detach()
    array = tensor.astype("float32").numpy() if tensor.dtype == paddle.bfloat16 else tensor.numpy()
    return np.array(array)


def parameter_dtype(model: paddle.nn.Layer) -> str:
    """The least exact float among the parameters: what decides how near two runs can be."""
    dtypes = {str(parameter.dtype).removeprefix("paddle.") for parameter in model.parameters()}
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        if dtype in dtypes:
            return dtype
    return "float32"


def run(model: paddle.nn.Layer, inputs: Inputs) -> list[paddle.Tensor]:
    """The model's output tensors, without gradients, at a fixed point of the random number stream."""
    with paddle.no_grad(), fixed_randomness():
        return flatten(called(model, inputs))


@contextlib.contextmanager
def fixed_randomness() -> Iterator[None]:
    """Whatever is drawn inside, Paddle's stream of random numbers is where it was: the next run draws the same."""
    state = paddle.get_rng_state()
    try:
        yield
    finally:
        paddle.set_rng_state(state)


@contextlib.contextmanager
def evaluating(model: paddle.nn.Layer) -> Iterator[None]:
    """``model.eval()`` inside; afterwards modes and statistics are as they were, layer by layer.

    Statistics matter because some norm layers move them in ``eval()`` too (``BatchNorm2D`` with
    ``use_global_stats=False``). ``SyncBatchNorm``, which has no CPU kernel, computes as the plain batch norm that
    it is in ``eval()`` where its parameters are on the CPU.
    """
    layers = [layer for _, layer in layers_of(model)]
    modes = [(path, layer, layer.training) for path, layer in layers_of(model)]
    classes = [(layer, type(layer)) for layer in layers if type(layer) is paddle.nn.SyncBatchNorm and _on_cpu(layer)]
    statistics = [
        (tensor, tensor.clone())
        for layer in layers
        for tensor in (getattr(layer, "_mean", None), getattr(layer, "_variance", None))
        if isinstance(tensor, paddle.Tensor)
    ]
    model.eval()
    for layer, _ in classes:
        layer.__class__ = SyncBatchNormOnCPU
    try:
        yield
    finally:
        for layer, kind in classes:
            layer.__class__ = kind
        present = dict(layers_of(model))
        for path, layer, training in modes:
            # Both the layer, which a fold may have taken out, and what stands in its place.
            layer.training = training
            if path in present:
                present[path].training = training
        for tensor, before in statistics:
            if not np.array_equal(to_numpy(tensor), to_numpy(before), equal_nan=True):
                tensor.set_value(before)


@contextlib.contextmanager
def undisturbed(model: paddle.nn.Layer) -> Iterator[Callable[[], None]]:
    """``eval()`` without gradients inside; afterwards modes, statistics, buffers and randomness are as they were.

    Yields:
        What puts the random number streams back to where they were.
    """
    with untouched(model) as rewind, evaluating(model), paddle.no_grad():
        yield rewind


@contextlib.contextmanager
def untouched(model: paddle.nn.Layer) -> Iterator[Callable[[], None]]:
    """Buffers and randomness are afterwards what they were, whatever the model did to them.

    Yields:
        What puts the random number streams back to where they were.
    """
    # By layer, for ``self.buffer = self.buffer + 1`` puts another tensor into its place.
    places = [(layer._buffers, dict(layer._buffers)) for _, layer in layers_of(model)]
    buffers = [(buffer, buffer.clone()) for _, held in places for buffer in held.values() if buffer is not None]
    # NumPy's legacy stream is the one that samplers shuffle by.
    streams = paddle.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002

    def rewind() -> None:
        paddle.set_rng_state(streams[0])
        np.random.set_state(streams[1])  # noqa: NPY002
        random.setstate(streams[2])

    try:
        yield rewind
    finally:
        rewind()
        for place, held in places:
            place.update(held)
        for buffer, before in buffers:
            if to_numpy(buffer).tobytes() != to_numpy(before).tobytes():
                buffer.set_value(before)


def _on_cpu(layer: paddle.nn.Layer) -> bool:
    return bool(layer._mean.place.is_cpu_place())


class SyncBatchNormOnCPU(paddle.nn.SyncBatchNorm):
    """SyncBatchNorm in ``eval()``, where there is nothing to synchronise, with the operator that every device has."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.batch_norm(
            x,
            self._mean,
            self._variance,
            weight=self.weight,
            bias=self.bias,
            training=False,
            epsilon=self._epsilon,
            data_format="NCHW" if self._data_format[1] == "C" else "NHWC",
        )
