"""Give a model of Paddle's norm layers Flatwater's, or norms of another kind, and back.

A layer is converted by exchanging its class: parameters, buffers, hooks, names, mode and whatever
refers to the layer stay what they are, because it is still the same object. Optimizers made before go on working.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import paddle

from flatwater.errors import InputError, SurgeryError
from flatwater.paddle import layers
from flatwater.paddle.captured import capture_anew
from flatwater.paddle.kinds import BATCH_NORMS, captured_obstacle, normalizes_by_batch, subclass_obstacle
from flatwater.paddle.norm import NormLayer
from flatwater.paddle.select import select
from flatwater.paddle.surgery.freeze import BEFORE_CONVERT, freeze_layers, frozen_parts, is_frozen, thaw_layers
from flatwater.paddle.surgery.recast import NormKind, is_fused, is_recast, kind_of, recast, restore
from flatwater.paddle.surgery.snapshot import Snapshot
from flatwater.paddle.sync.convert import revert_sync_batchnorm
from flatwater.paddle.sync.layer import SyncBatchNorm
from flatwater.spec import canonical_activation
from flatwater.surgery.converted import ConvertReport

__all__ = ["convert", "revert"]

_CLASSES: dict[type, type] = {
    getattr(paddle.nn, name): getattr(layers, name) for name in layers.__all__ if hasattr(paddle.nn, name)
}
_STOCK: dict[type, type] = {
    **{ours: theirs for theirs, ours in _CLASSES.items()},
    SyncBatchNorm: paddle.nn.SyncBatchNorm,
}


def convert(
    model: paddle.nn.Layer,
    to: NormKind | Literal["frozen"] | None = None,
    *,
    pattern: str | Sequence[str] | None = None,
    groups: int | None = None,
) -> ConvertReport:
    """Let the norm layers of ``model`` compute with Flatwater's kernels, or make them another kind of norm, in place.

    γ and β are the same parameters in every kind. Group and instance norm have no place for moving statistics; they
    are kept aside in the layer, from where :func:`revert`, or converting to batch norm, takes them again. A layer that
    never had any begins with mean 0 and variance 1.

    Layers of a subclass that somebody else wrote are left, for their ``forward`` may do more. What ``to_static``
    captured of ``model`` is captured anew at the next call.

    Args:
        to: None keeps the kind of each layer and changes stock classes to ours. ``"batch_norm"``,
            ``"sync_batch_norm"``, ``"group_norm"`` and ``"instance_norm"`` change what is of another kind;
            ``"frozen"`` makes batch norms that are frozen, see :func:`~flatwater.paddle.freeze`.
        pattern: a glob, or several, one of which a layer's path must match (``"backbone.*"``); None for all.
        groups: of group norm; None for 32, or the largest power of two below that divides the channels and leaves
            each group two of them.

    Returns:
        What was changed, what could not be held, and why other norm layers were left.

    Raises:
        SurgeryError: ``model`` is not a ``paddle.nn.Layer``, or no norm layer matches ``pattern``.
        InputError: an unknown kind, or ``groups`` that no kind but group norm takes, or below 1.
        StatisticsError: statistics to freeze that are NaN, infinite or negative; nothing was changed.
    """
    kinds = (*get_args(NormKind), "frozen")
    if to is not None and to not in kinds:
        raise InputError(f"to={to!r} is no kind of norm; use None or one of {', '.join(kinds)}")
    if groups is not None and (to != "group_norm" or groups < 1):
        raise InputError(f"groups={groups} with to={to!r}: it is a positive number of groups, for group_norm only")
    report = ConvertReport()
    norms = _norms(model, pattern)
    whole = Snapshot(layer for _, layer in norms)
    try:
        for path, layer in norms:
            before = Snapshot([layer])
            try:
                note = _convert(model, path, layer, to, groups)
            except SurgeryError as error:
                before.restore()
                report.left[path] = str(error)
                continue
            report.changed.append(path)
            if note:
                report.notes[path] = note
        if report.changed:
            capture_anew(model)
    except BaseException:
        whole.restore()
        raise
    return report


def revert(model: paddle.nn.Layer, *, pattern: str | Sequence[str] | None = None) -> ConvertReport:
    """The way back: the kinds and stock classes that the layers were of, so that the model no longer needs Flatwater.

    Moving statistics that were kept aside are in their places again, bit for bit. A layer that fuses an activation has
    no stock equal and is left; ``BatchNorm`` keeps its activation, for Paddle's class of that name has one too. Stock
    layers pass single values through, whatever was set here. What :func:`~flatwater.paddle.freeze` froze stays frozen.

    Returns:
        What was changed, what the stock classes do otherwise, and why other layers were left.

    Raises:
        SurgeryError: ``model`` is not a ``paddle.nn.Layer``, or no norm layer matches ``pattern``.
    """
    report = ConvertReport()
    for path, layer in _norms(model, pattern):
        before, thawed, note = type(layer), False, None
        try:
            thawed = _thaw(model, path, layer)
            if (is_recast(layer) or type(layer) in _STOCK) and (captured := captured_obstacle(layer)) is not None:
                raise SurgeryError(captured)
            if is_recast(layer) or isinstance(layer, SyncBatchNorm):
                if is_frozen(layer):
                    raise SurgeryError(f"this {before.__name__} is frozen; thaw it first")
                restore(layer)
                revert_sync_batchnorm(layer)
            note = _make_stock(layer)
        except SurgeryError as error:
            report.left[path] = str(error)
        if thawed or type(layer) is not before:
            report.changed.append(path)
            if note:
                report.notes[path] = note
    if report.changed:
        capture_anew(model)
    return report


def _norms(model: paddle.nn.Layer, pattern: str | Sequence[str] | None) -> list[tuple[str, Any]]:
    norms = select(model, lambda layer: kind_of(layer) is not None, pattern, "norm layer", required=False)
    return list(norms.items())


def _convert(
    model: paddle.nn.Layer, path: str, layer: Any, to: NormKind | Literal["frozen"] | None, groups: int | None
) -> str | None:
    """Convert one layer; returns what it could not hold. Raises SurgeryError to say why it is left."""
    if to is None:
        return _make_ours(layer)
    if to == "frozen":
        _freeze(model, path, layer)
        return None
    if kind_of(layer) == to and (groups is None or layer._num_groups == groups):
        raise SurgeryError(f"is {to} already")
    return recast(layer, to, groups=groups)


def _make_ours(layer: Any) -> str | None:
    if isinstance(layer, NormLayer):
        raise SurgeryError("is Flatwater's already")
    if isinstance(layer, paddle.nn.SyncBatchNorm):
        raise SurgeryError("SyncBatchNorm shares statistics between ranks; use fw.convert_sync_batchnorm(model)")
    if isinstance(layer, paddle.nn.LayerNorm):
        raise SurgeryError("LayerNorm normalizes over features; Flatwater has no kernel for it")
    if type(layer) not in _CLASSES:
        raise SurgeryError(subclass_obstacle(layer))
    if (captured := captured_obstacle(layer)) is not None:
        raise SurgeryError(captured)
    if not is_fused(getattr(layer, "_act", None)):
        raise SurgeryError(f"its activation {layer._act!r} is not one that is fused")
    by_batch = isinstance(layer, BATCH_NORMS) and normalizes_by_batch(layer, training=False)
    layer.__class__ = _CLASSES[type(layer)]
    if by_batch and not normalizes_by_batch(layer, training=False):
        return "use_global_stats=False was the batch's statistics in eval() too; now eval() takes the moving ones"
    return None


def _make_stock(layer: Any) -> str | None:
    """Exchange the class for Paddle's; returns what that does otherwise. Raises SurgeryError where there is no such."""
    stock: Any = _STOCK.get(type(layer))
    if stock is None:
        return None
    if layer._act and stock is not paddle.nn.BatchNorm:
        raise SurgeryError(f"act={layer._act!r} is fused into it; paddle.nn.{stock.__name__} has no activation")
    activation = canonical_activation(layer._act)
    if activation == "leaky_relu":
        raise SurgeryError(f"act={layer._act!r} is fused into it, and paddle.nn.BatchNorm fails on that")
    vars(layer).pop("_accepted", None)
    if activation == "hardswish":
        layer._act = "hard_swish"  # as the stock layer's operator is called
    by_batch = isinstance(layer, BATCH_NORMS) and normalizes_by_batch(layer, training=False)
    layer.__class__ = stock
    if isinstance(layer, BATCH_NORMS) and normalizes_by_batch(layer, training=False) and not by_batch:
        return (
            f"use_global_stats=False makes paddle.nn.{stock.__name__} normalize by the batch in eval() too, and move "
            "its statistics; set layer._use_global_stats = None to go on as before"
        )
    return None


def _freeze(model: paddle.nn.Layer, path: str, layer: Any) -> None:
    if not is_frozen(layer):
        restore(layer)
    if not isinstance(layer, BATCH_NORMS):
        raise SurgeryError(f"{type(layer).__name__} has no moving statistics to freeze")
    parts = frozen_parts(layer)
    report = freeze_layers(model, {path: layer}, weight=True, bias=True, statistics=True)
    if report.left:
        raise SurgeryError(report.left[path])
    vars(layer).setdefault(BEFORE_CONVERT, parts)


def _thaw(model: paddle.nn.Layer, path: str, layer: Any) -> bool:
    """Whether ``convert(model, "frozen")`` had frozen anything of the layer; what was frozen before that still is."""
    if BEFORE_CONVERT not in vars(layer):
        return False
    weight, bias, statistics = vars(layer)[BEFORE_CONVERT]
    report = thaw_layers(model, {path: layer}, weight=not weight, bias=not bias, statistics=not statistics)
    vars(layer).pop(BEFORE_CONVERT, None)
    return bool(report.changed)
