"""``convert_sync_batchnorm`` and ``revert_sync_batchnorm``: batch norm layers synchronised in place, and back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import paddle

from flatwater.errors import SurgeryError
from flatwater.paddle import layers
from flatwater.paddle.captured import capture_anew
from flatwater.paddle.kinds import BATCH_NORMS, FROZEN, captured_obstacle, normalizes_by_batch, subclass_obstacle
from flatwater.paddle.running import layers_of
from flatwater.paddle.sync.groups import Sharing
from flatwater.paddle.sync.layer import SyncBatchNorm
from flatwater.spec import canonical_activation
from flatwater.surgery import ChangeReport

__all__ = ["Exclude", "convert_sync_batchnorm", "revert_sync_batchnorm"]

Exclude: TypeAlias = Collection[str] | Callable[[str, paddle.nn.Layer], bool]

_NAMES = ("BatchNorm", "BatchNorm1D", "BatchNorm2D", "BatchNorm3D")
_CLASSES: tuple[type, ...] = (
    *(getattr(home, name) for home in (paddle.nn, layers) for name in _NAMES),
    paddle.nn.SyncBatchNorm,
)
# What a layer has beside the attributes that it had: its class before, with whom it shares, and what it looked up.
_ADDED = ("_former_class", "_shared_ranks", "_group_id", "_timeout", "_accepted")


def convert_sync_batchnorm(
    model: paddle.nn.Layer, process_group: Any = None, *, exclude: Exclude = (), timeout: float = 60.0
) -> ChangeReport:
    """Let every batch norm of ``model`` normalize by the global batch, in place.

    Paddle's ``BatchNorm``, ``BatchNorm1D/2D/3D`` and ``SyncBatchNorm`` and ours become :class:`SyncBatchNorm` by
    exchanging the class of the layer: parameters, statistics, momentum, ``use_global_stats``, mode, hooks and names
    are what they were, because it is the same object; optimisers made before go on working.

    Statistics have to be equal on all ranks to begin with. They are not where plain batch norm was trained by several
    ranks; then call :func:`~flatwater.paddle.average_statistics` first.

    Args:
        process_group: with whom to share, see :class:`SyncBatchNorm`.
        exclude: paths of layers that stay as they are, with all that is below them; or a function of path and layer
            that says whether one stays.
        timeout: seconds to wait for other ranks.

    Returns:
        What was changed, and why the other batch norms were left.

    Raises:
        SurgeryError: ``model`` is not a ``paddle.nn.Layer``, or there is no layer at a path in ``exclude``.
        InputError: a timeout that is not positive, or a ``process_group`` that is no set of ranks; nothing was changed.
    """
    found = layers_of(model)
    sharing = Sharing.of(process_group, timeout)
    excluded = _excluded(found, exclude)
    report = ChangeReport()
    for path, layer in found:
        if not isinstance(layer, BATCH_NORMS):
            continue
        reason = "is excluded" if excluded(path, layer) else _obstacle(layer)
        if reason:
            report.left[path] = reason
            continue
        layer._former_class = type(layer)
        layer.__class__ = SyncBatchNorm
        layer._share(sharing)
        report.changed.append(path)
    if report.changed:
        capture_anew(model)
    return report


def revert_sync_batchnorm(model: paddle.nn.Layer) -> ChangeReport:
    """The way back: every layer that :func:`convert_sync_batchnorm` changed is of its former class again.

    A layer that was built as a SyncBatchNorm has no former class, and is left.

    Raises:
        SurgeryError: ``model`` is not a ``paddle.nn.Layer``.
    """
    report = ChangeReport()
    for path, layer in layers_of(model):
        if not isinstance(layer, SyncBatchNorm):
            continue
        former = vars(layer).get("_former_class")
        if former is None:
            report.left[path] = "was built as a SyncBatchNorm"
            continue
        if former is paddle.nn.SyncBatchNorm and layer._use_global_stats and FROZEN in vars(layer):
            report.left[path] = "is frozen, which Paddle's SyncBatchNorm does not look at; thaw it first"
            continue
        for name in _ADDED:
            layer.__dict__.pop(name, None)
        layer.__class__ = former
        report.changed.append(path)
    if report.changed:
        capture_anew(model)
    return report


def _obstacle(layer: Any) -> str | None:
    if isinstance(layer, SyncBatchNorm):
        return "is synchronised already"
    if type(layer) not in _CLASSES:
        return subclass_obstacle(layer)
    if (captured := captured_obstacle(layer)) is not None:
        return captured
    if normalizes_by_batch(layer, training=False):
        # Paddle's two ways to say so: nn.BatchNorm's, and that of BatchNorm1D/2D/3D.
        setting = "trainable_statistics=True" if isinstance(layer, paddle.nn.BatchNorm) else "use_global_stats=False"
        return (
            f"{setting} normalizes by the batch in eval() too, where ranks do not wait for each other; build it without"
        )
    try:
        canonical_activation(getattr(layer, "_act", None))
    except ValueError:
        return f"act={layer._act!r} is not an activation that is fused"
    return None


def _excluded(found: list[tuple[str, paddle.nn.Layer]], exclude: Exclude) -> Callable[[str, paddle.nn.Layer], bool]:
    if callable(exclude):
        return exclude
    roots = [exclude] if isinstance(exclude, str) else list(exclude)
    paths = {path for path, _ in found}
    for root in roots:
        if root not in paths:
            raise SurgeryError(f"exclude names {root!r}, but the model has no layer there; see model.named_sublayers()")
    return lambda path, _: any(path == root or path.startswith(f"{root}.") for root in roots)
