"""Norm layers as they are now, so that what fails halfway can be undone to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import paddle

from flatwater.paddle.running import flatten, to_numpy

__all__ = ["Snapshot"]


# What of a layer a training that goes on, and whoever works with the model meanwhile, may have changed for good. (A
# forward that was captured of another class is none of this one.)
_OF_NOW = ("training", "_dtype", "forward")


class _Saved(NamedTuple):
    layer: Any
    kind: type
    attributes: dict[str, Any]
    parameters: dict[str, Any]


class _SavedParameter(NamedTuple):
    parameter: Any
    values: paddle.Tensor
    grad: paddle.Tensor | None
    stop_gradient: bool
    attributes: dict[str, Any]


class Snapshot:
    """Classes, attributes, and the parameters' identity, values, gradients and settings of these layers."""

    def __init__(self, layers: Iterable[paddle.nn.Layer]) -> None:
        self._layers = [_Saved(layer, type(layer), _copied(vars(layer)), dict(layer._parameters)) for layer in layers]
        found = {id(one): one for saved in self._layers for one in saved.parameters.values() if one is not None}
        self._parameters = [
            _SavedParameter(one, one.detach().clone(), _gradient(one), one.stop_gradient, _copied(vars(one)))
            for one in found.values()
        ]

    def restore(self, *, running: bool = True) -> None:
        """Make everything what it was. Parameters are the same objects.

        Args:
            running: modes, gradients, and a ``forward`` put into a layer, as by ``to_static``, as well; False where
                this is not the end of something that failed, but later: then these, and dtypes, are as they are now.
        """
        for layer, kind, attributes, parameters in self._layers:
            kept = () if running else _OF_NOW if type(layer) is kind else _OF_NOW[:-1]
            now = {name: vars(layer)[name] for name in kept if name in vars(layer)}
            layer.__class__ = kind
            vars(layer).clear()
            vars(layer).update(attributes)
            layer._parameters.clear()
            layer._parameters.update(parameters)
            for name in kept:
                vars(layer).pop(name, None)
            vars(layer).update(now)
            if layer._dtype != attributes["_dtype"]:
                layer.to(dtype=layer._dtype)  # statistics that were aside while the model was cast
        for parameter, values, grad, stop_gradient, attributes in self._parameters:
            vars(parameter).clear()
            vars(parameter).update(attributes)
            parameter.stop_gradient = stop_gradient
            if parameter.dtype != values.dtype:
                parameter.set_value(values.astype(parameter.dtype))
            elif to_numpy(parameter).tobytes() != to_numpy(values).tobytes():
                parameter.set_value(values)
            if running and grad is not None and parameter.grad is None:
                parameter.grad = grad


def _gradient(parameter: paddle.Tensor) -> paddle.Tensor | None:
    """A copy, for clearing a gradient empties the tensor that others hold."""
    return None if parameter.grad is None else parameter.grad.clone()


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Only what Flatwater remembers in a layer is changed in place; everything else is replaced."""
    return {name: _remembered(value) if name.startswith("_flatwater_") else value for name, value in attributes.items()}


def _remembered(value: Any) -> Any:
    """A copy that holds the same tensors: what was kept aside comes back as the parameter that it was."""
    tensors = flatten(list(getattr(value, "__dict__", {}).values()))
    return copy.deepcopy(value, {id(tensor): tensor for tensor in tensors})
