"""One norm layer as another kind of norm: the same object, with the same parameters, in another class.

What normalizes by the batch keeps moving statistics, what normalizes each sample has no place for them: they are kept
aside, in the layer, so that copies and pickles of a model have them too, and :func:`restore` puts them back. Every
change begins from what the layer was at first, so that a chain of them loses nothing either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import paddle
from paddle import nn
from paddle.nn.layer.norm import _InstanceNormBase

from flatwater.advice import choose_groups
from flatwater.errors import InputError, SurgeryError
from flatwater.paddle import layers
from flatwater.paddle.kinds import BATCH_NORMS, INSTANCE_NORMS, captured_obstacle, subclass_obstacle
from flatwater.paddle.surgery.freeze import is_frozen
from flatwater.paddle.sync.convert import convert_sync_batchnorm, revert_sync_batchnorm
from flatwater.paddle.sync.layer import SyncBatchNorm
from flatwater.spec import canonical_activation

__all__ = [
    "InstanceNorm",
    "NormKind",
    "affine_of",
    "channels_of",
    "is_fused",
    "is_recast",
    "kind_of",
    "recast",
    "recast_obstacle",
    "restore",
]

NormKind: TypeAlias = Literal["batch_norm", "sync_batch_norm", "group_norm", "instance_norm"]

# Where a layer keeps its _Former.
_FORMER = "_flatwater_before_recast"
_STATISTICS = ("_mean", "_variance")


class InstanceNorm(layers._InstanceNorm, _InstanceNormBase):
    __doc__ = f"""Instance norm for inputs of rank 3 to 5: what a batch norm that takes several ranks becomes.
    {layers._InstanceNorm.__doc__}"""

    _ranks = (3, 4, 5)


_RANKS = ("1D", "2D", "3D")
_TO_INSTANCE: dict[type, type] = {
    getattr(home, f"BatchNorm{rank}"): getattr(layers, f"InstanceNorm{rank}")
    for home in (nn, layers)
    for rank in _RANKS
}
_TO_BATCH: dict[type, type] = {
    getattr(home, f"InstanceNorm{rank}"): getattr(layers, f"BatchNorm{rank}")
    for home in (nn, layers)
    for rank in _RANKS
}
_CLASSES: tuple[type, ...] = (
    *_TO_INSTANCE,
    *_TO_BATCH,
    *(getattr(home, name) for home in (nn, layers) for name in ("BatchNorm", "GroupNorm")),
    nn.SyncBatchNorm,
    SyncBatchNorm,
    InstanceNorm,
)


@dataclass
class _Former:
    """What a layer was before it was another kind.

    Attributes:
        kind: its class.
        parameters: the names of its parameters, in order.
        statistics: the moving ones, by name.
        replaced: attributes that had other values.
        added: attributes that it had not.
    """

    kind: type
    parameters: list[str]
    statistics: dict[str, paddle.Tensor]
    replaced: dict[str, Any] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)


def kind_of(layer: paddle.nn.Layer) -> NormKind | Literal["layer_norm"] | None:
    """What kind of norm a layer is, of whichever package or subclass; None if it is none."""
    if isinstance(layer, nn.SyncBatchNorm):
        return "sync_batch_norm"
    if isinstance(layer, BATCH_NORMS):
        return "batch_norm"
    if isinstance(layer, nn.GroupNorm):
        return "group_norm"
    if isinstance(layer, INSTANCE_NORMS):
        return "instance_norm"
    return "layer_norm" if isinstance(layer, nn.LayerNorm) else None


def is_fused(activation: str | None) -> bool:
    """Whether our layers have this activation, as ``paddle.nn.BatchNorm`` names it."""
    try:
        canonical_activation(activation)
    except InputError:
        return False
    return True


def is_recast(layer: paddle.nn.Layer) -> bool:
    """Whether :func:`restore` has something to restore."""
    return _FORMER in vars(layer)


def affine_of(layer: Any) -> tuple[Any, Any]:
    """γ and β, None for what the layer has not."""
    return getattr(layer, _scale_name(layer)), layer.bias


def channels_of(layer: Any) -> int:
    """How many channels a norm layer has; of layer norm, how many features."""
    own = vars(layer)
    if isinstance(layer, nn.LayerNorm):
        return math.prod(own["_normalized_shape"])
    if "_mean" in layer._parameters:
        return int(layer._mean.shape[0])
    return int(own["_num_channels"] if isinstance(layer, nn.GroupNorm) else own["_num_features"])


def recast(layer: Any, kind: NormKind, *, groups: int | None = None) -> str | None:
    """Make a norm layer another kind of norm, in place; ``groups`` are of group norm.

    Returns:
        What the new kind could not hold, or begins without; None if nothing.

    Raises:
        SurgeryError: it cannot be that; nothing was changed, unless a batch norm cannot be synchronised.
    """
    if _is(layer, kind, groups):
        return None
    _check(layer, kind, groups)
    restore(layer)
    if _is(layer, kind, groups):
        return None
    if kind_of(layer) == "batch_norm" and kind == "sync_batch_norm":
        _synchronize(layer)
        return None
    if "_former_class" in vars(layer) and kind == "batch_norm":
        revert_sync_batchnorm(layer)
        if _is(layer, kind, groups):  # and not Paddle's own SyncBatchNorm, which ours was made of
            return None
    if kind == "group_norm":
        return _to_group_norm(layer, groups or choose_groups(channels_of(layer)) or 1)
    if kind == "instance_norm":
        return _to_instance_norm(layer)
    note = _to_batch_norm(layer)
    if kind == "sync_batch_norm":
        _synchronize(layer)
    return note


def recast_obstacle(layer: Any) -> str | None:
    """Why :func:`recast` would not make the layer group norm, or any other kind; None if it would."""
    try:
        _check(layer, "group_norm", None)
    except SurgeryError as error:
        return str(error)
    return None


def restore(layer: Any) -> bool:
    """Whether :func:`recast` had changed the layer, which is then what it was, statistics included."""
    former: _Former | None = vars(layer).get(_FORMER)
    if former is None:
        return False
    if isinstance(layer, SyncBatchNorm) and "_former_class" in vars(layer) and former.kind is not SyncBatchNorm:
        revert_sync_batchnorm(layer)
    attributes = vars(layer)
    weight, bias = affine_of(layer)
    for name in (_FORMER, "_accepted", *former.added):
        attributes.pop(name, None)
    attributes.update(former.replaced)
    layer.__class__ = former.kind
    present = {_scale_name(layer): weight, "bias": bias, **former.statistics}
    _set_parameters(layer, {name: present[name] for name in former.parameters})
    held = [tensor for tensor in (weight, bias) if tensor is not None]
    if held and any(tensor.dtype != held[0].dtype for tensor in former.statistics.values()):
        layer.to(dtype=held[0].dtype)  # as the model was, while they were aside
    return True


def _is(layer: Any, kind: NormKind, groups: int | None) -> bool:
    return kind_of(layer) == kind and (kind != "group_norm" or groups in (None, layer._num_groups))


def _check(layer: Any, kind: NormKind, groups: int | None) -> None:
    name = type(layer).__name__
    if type(layer) not in _CLASSES:
        reason = subclass_obstacle(layer)
        if kind_of(layer) == "layer_norm":
            reason = f"{name} normalizes over features, which no other kind does"
        raise SurgeryError(reason)
    if (captured := captured_obstacle(layer)) is not None:
        raise SurgeryError(captured)
    if is_frozen(layer):
        raise SurgeryError(f"this {name} is frozen; thaw it first")
    if not is_fused(getattr(layer, "_act", None)):
        raise SurgeryError(f"its activation {layer._act!r} is not one that is fused")
    if groups is not None and channels_of(layer) % groups:
        raise SurgeryError(f"groups={groups} does not divide its {channels_of(layer)} channels; choose a divisor")
    if kind == "instance_norm" and _channels_last(layer):
        raise SurgeryError("its channels are last, which Paddle's instance norm does not take")


def _synchronize(layer: Any) -> None:
    report = convert_sync_batchnorm(layer)
    if report.left:
        raise SurgeryError(next(iter(report.left.values())))


def _to_group_norm(layer: Any, groups: int) -> str | None:
    attributes = {
        "_num_groups": groups,
        "_num_channels": channels_of(layer),
        "_data_format": "NHWC" if _channels_last(layer) else "NCHW",
    }
    return _become(layer, layers.GroupNorm, attributes)


def _to_instance_norm(layer: Any) -> str | None:
    attributes = {
        "_num_features": channels_of(layer),
        "_data_format": "NCHW",
        "_momentum": getattr(layer, "_momentum", 0.9),
    }
    return _become(layer, _TO_INSTANCE.get(type(layer), InstanceNorm), attributes)


def _to_batch_norm(layer: Any) -> str | None:
    attributes: dict[str, Any] = {
        "_momentum": getattr(layer, "_momentum", 0.9),
        "_act": getattr(layer, "_act", None),
        "_use_global_stats": getattr(layer, "_use_global_stats", None),
        "_in_place": False,
        "_fuse_with_relu": False,
        "_name": getattr(layer, "_name", None),
    }
    kind = _TO_BATCH.get(type(layer), layers.BatchNorm)
    if kind is layers.BatchNorm:
        attributes["_data_layout"] = "NHWC" if _channels_last(layer) else "NCHW"
        attributes |= {"_is_test": False, "_trainable_statistics": False}
    return _become(layer, kind, attributes)


def _become(layer: Any, kind: type, attributes: dict[str, Any]) -> str | None:
    """Exchange the class; returns what had to be left aside, or begins anew."""
    own = vars(layer)
    parameters = layer._parameters
    former = _Former(
        type(layer), list(parameters), {name: parameters[name] for name in _STATISTICS if name in parameters}
    )
    weight, bias = affine_of(layer)
    channels = channels_of(layer)
    layer.__class__ = kind
    # What the layer has not is an attribute that is None, as Paddle's constructors leave it.
    attributes |= {name: None for name, tensor in ((_scale_name(layer), weight), ("bias", bias)) if tensor is None}
    former.replaced = {name: own[name] for name in attributes if name in own}
    former.added = [name for name in attributes if name not in own]
    own.update(attributes)
    own.pop("_accepted", None)
    present = {_scale_name(layer): weight, "bias": bias}
    note = None
    if isinstance(layer, BATCH_NORMS):
        if not former.statistics:
            note = "its moving statistics begin at mean 0 and variance 1; train or recalibrate before evaluating"
        present |= former.statistics or _new_statistics(layer, channels, weight)
    elif former.statistics:
        note = f"{kind.__name__} has no place for moving statistics; they are kept aside for fw.revert()"
    _set_parameters(layer, present)
    own[_FORMER] = former
    return note


def _new_statistics(layer: Any, channels: int, weight: paddle.Tensor | None) -> dict[str, paddle.Tensor]:
    created = {}
    for name, value in zip(_STATISTICS, (0.0, 1.0), strict=True):
        attr = paddle.ParamAttr(initializer=nn.initializer.Constant(value), trainable=False)
        dtype = "float32" if weight is None else weight.dtype
        created[name] = layer.create_parameter([channels], attr=attr, dtype=dtype)
        created[name].stop_gradient = True
    return created


def _set_parameters(layer: Any, parameters: dict[str, Any]) -> None:
    layer._parameters.clear()
    layer._parameters.update({name: tensor for name, tensor in parameters.items() if tensor is not None})


def _scale_name(layer: Any) -> str:
    return "scale" if isinstance(layer, INSTANCE_NORMS) else "weight"


def _channels_last(layer: Any) -> bool:
    own = vars(layer)
    return str(own.get("_data_layout") or own["_data_format"])[1] != "C"
