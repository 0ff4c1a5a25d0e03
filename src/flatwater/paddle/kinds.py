"""Which layers are norm layers, and by what each of them normalizes: said once, for stock layers and ours."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn
from paddle.nn.layer.norm import _BatchNormBase, _InstanceNormBase

from flatwater.paddle.norm import NormLayer

__all__ = [
    "BATCH_NORMS",
    "FROZEN",
    "INSTANCE_NORMS",
    "SAMPLE_NORMS",
    "captured_obstacle",
    "normalizes_by_batch",
    "subclass_obstacle",
]

FROZEN = "_flatwater_before_freeze"
"""Where a layer that :func:`~flatwater.paddle.freeze` froze keeps what it was like."""

BATCH_NORMS = (nn.BatchNorm, _BatchNormBase)
"""Statistics over the batch, kept as moving ones; ``nn.BatchNorm`` is not a ``_BatchNormBase``."""

INSTANCE_NORMS = (_InstanceNormBase,)

SAMPLE_NORMS = (nn.GroupNorm, *INSTANCE_NORMS, nn.LayerNorm)
"""Statistics of each sample by itself; nothing is kept."""


@paddle.jit.not_to_static
def normalizes_by_batch(layer: Any, *, training: bool) -> bool:
    """Whether a batch norm takes the batch's statistics in this mode, and moves its own.

    ``use_global_stats=False`` means the same as None to ``nn.BatchNorm`` and to every layer of ours, but "in
    ``eval()`` too" to Paddle's ``BatchNorm1D/2D/3D``; its SyncBatchNorm does not look at the setting at all.
    """
    if isinstance(layer, nn.BatchNorm):
        return (training or bool(layer._trainable_statistics)) and not layer._use_global_stats
    if isinstance(layer, nn.SyncBatchNorm) and not isinstance(layer, NormLayer):
        return training
    if isinstance(layer, NormLayer) or layer._use_global_stats is None:
        return training and not layer._use_global_stats
    return not layer._use_global_stats


def subclass_obstacle(layer: Any) -> str:
    """Why a norm layer whose class somebody else wrote is left as it is."""
    return f"{type(layer).__name__} is a subclass, which may do more than the norm that it comes from"


def captured_obstacle(layer: Any) -> str | None:
    """Why a norm layer that has a forward in the instance stays what it is: that of another class would not be called.

    ``to_static(full_graph=False)`` leaves there what the class has anyway. That is no obstacle, and taken away.
    """
    own = vars(layer).get("forward")
    if own is not None and getattr(own, "__func__", None) is type(layer).forward:
        del vars(layer)["forward"]
        own = None
    if own is None:
        return None
    return f"this {type(layer).__name__} has a forward of its own, captured by to_static perhaps; convert before that"
