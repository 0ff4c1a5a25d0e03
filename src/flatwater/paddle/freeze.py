"""Freezing norm layers for fine-tuning: running statistics in training too, γ and β fixed."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import paddle

from flatwater.errors import SurgeryError
from flatwater.paddle.kinds import BATCH_NORMS, SAMPLE_NORMS
from flatwater.paddle.running import layers_of
from flatwater.paddle.view import norm_values
from flatwater.surgery import ChangeReport, check_statistics

__all__ = ["freeze", "thaw"]

# On a frozen layer: what the settings were, for thaw.
_MEMORY = "_flatwater_before_freeze"


def freeze(
    model: paddle.nn.Layer, *, affine: bool = True, statistics: bool = True, pattern: str | None = None
) -> ChangeReport:
    """Stop the batch norm layers of ``model`` from learning, in place. Doing it twice is doing it once.

    Args:
        affine: γ and β get ``stop_gradient = True``.
        statistics: ``train()`` normalizes by the running statistics as ``eval()`` does, and leaves them alone
            (``_use_global_stats = True``).
        pattern: a glob that a layer's path must match (``"backbone.*"``); None for every layer.

    Returns:
        The paths changed, and why others were left.

    Raises:
        SurgeryError: nothing was asked for, or no batch norm layer matches; nothing was changed.
        StatisticsError: the running statistics to freeze are NaN, infinite or negative; nothing was changed.
    """
    if not (affine or statistics):
        raise SurgeryError("freeze(affine=False, statistics=False) asks for nothing; set one of them to True")
    report = ChangeReport()
    matching = _matching(model, pattern, report)
    for path, layer in matching if statistics else ():
        check_statistics(path, norm_values(layer))
    for path, layer in matching:
        if statistics and isinstance(layer, paddle.nn.SyncBatchNorm):
            report.left[path] = (
                "Paddle's SyncBatchNorm ignores use_global_stats: in train() it always normalizes by the batch; "
                "freeze with statistics=False, or use BatchNorm2D"
            )
            continue
        if _freeze(layer, affine, statistics):
            report.changed.append(path)
        else:
            report.left[path] = "is frozen already"
    return report


def thaw(model: paddle.nn.Layer, *, pattern: str | None = None) -> ChangeReport:
    """Undo :func:`freeze`: each layer gets back exactly the settings that it had before it was frozen first.

    Raises:
        SurgeryError: no batch norm layer matches ``pattern``.
    """
    report = ChangeReport()
    for path, layer in _matching(model, pattern, report):
        memory: dict[str, Any] | None = layer.__dict__.pop(_MEMORY, None)
        if memory is None:
            report.left[path] = "is not frozen"
            continue
        for name, value in memory.items():
            if name == "_use_global_stats":
                layer._use_global_stats = value
            else:
                getattr(layer, name).stop_gradient = value
        report.changed.append(path)
    return report


def _matching(model: paddle.nn.Layer, pattern: str | None, report: ChangeReport) -> list[tuple[str, paddle.nn.Layer]]:
    """The batch norms that ``pattern`` selects; other norms that it selects are noted as left."""
    layers = [(path, layer) for path, layer in layers_of(model) if pattern is None or fnmatchcase(path, pattern)]
    for path, layer in layers:
        if isinstance(layer, SAMPLE_NORMS):
            report.left[path] = f"{type(layer).__name__} has no running statistics"
    matching = [(path, layer) for path, layer in layers if isinstance(layer, BATCH_NORMS)]
    if not matching:
        which = (
            "has no batch norm layer" if pattern is None else f"has no batch norm layer whose path matches {pattern!r}"
        )
        raise SurgeryError(f"the {type(model).__name__} {which}; see model.named_sublayers() for its paths")
    return matching


def _freeze(layer: paddle.nn.Layer, affine: bool, statistics: bool) -> bool:
    """Whether anything had to be changed."""
    memory: dict[str, Any] = layer.__dict__.get(_MEMORY, {})
    before = len(memory)
    if statistics and layer._use_global_stats is not True:
        memory.setdefault("_use_global_stats", layer._use_global_stats)
        layer._use_global_stats = True
    for name in ("weight", "bias") if affine else ():
        parameter = getattr(layer, name)
        if parameter is not None and not parameter.stop_gradient:
            memory.setdefault(name, parameter.stop_gradient)
            parameter.stop_gradient = True
    if memory:
        layer.__dict__[_MEMORY] = memory
    return len(memory) > before
