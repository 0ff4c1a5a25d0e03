"""Give a model of Paddle's norm layers Flatwater's, and back.

A layer is converted by exchanging its class: parameters, buffers, hooks, names, mode and whatever
refers to the layer stay what they are, because it is still the same object.
"""

from __future__ import annotations

import paddle

from flatwater.paddle import layers
from flatwater.paddle.norm import NormLayer
from flatwater.paddle.running import layers_of
from flatwater.surgery import ChangeReport

__all__ = ["convert", "revert"]

_CLASSES: dict[type, type] = {
    getattr(paddle.nn, name): getattr(layers, name) for name in layers.__all__ if hasattr(paddle.nn, name)
}


def convert(model: paddle.nn.Layer) -> ChangeReport:
    """Let every stock norm layer of ``model`` compute with Flatwater's kernels, in place.

    Layers of a subclass that somebody else wrote are left, for their ``forward`` may do more.

    Raises:
        SurgeryError: ``model`` is not a ``paddle.nn.Layer``.
    """
    report = ChangeReport()
    for path, layer in layers_of(model):
        if type(layer) in _CLASSES:
            layer.__class__ = _CLASSES[type(layer)]
            report.changed.append(path)
        elif isinstance(layer, NormLayer):
            report.left[path] = "is Flatwater's already"
        elif isinstance(layer, paddle.nn.SyncBatchNorm):
            report.left[path] = "SyncBatchNorm shares statistics between ranks; use fw.convert_sync_batchnorm(model)"
        elif isinstance(layer, tuple(_CLASSES)):
            report.left[path] = f"{type(layer).__name__} is a subclass with a forward of its own"
    return report


def revert(model: paddle.nn.Layer) -> ChangeReport:
    """The way back: stock classes again, so that the model no longer needs Flatwater.

    A layer that fuses an activation has no stock equal and is left; ``BatchNorm`` keeps its activation, for
    Paddle's class of that name has one too. Stock layers pass single values through, whatever was set here.
    """
    stock = {ours: theirs for theirs, ours in _CLASSES.items()}
    report = ChangeReport()
    for path, layer in layers_of(model):
        if type(layer) not in stock:
            continue
        if layer._act and stock[type(layer)] is not paddle.nn.BatchNorm:
            report.left[path] = (
                f"act={layer._act!r} is fused into it; paddle.nn.{type(layer).__name__} has no activation"
            )
            continue
        layer.__class__ = stock[type(layer)]
        report.changed.append(path)
    return report
