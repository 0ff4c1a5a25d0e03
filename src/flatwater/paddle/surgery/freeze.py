"""Freezing norm layers for fine-tuning: running statistics in training too, γ and β fixed, and the proof of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import paddle

from flatwater.errors import SurgeryError
from flatwater.paddle.captured import capture_anew
from flatwater.paddle.kinds import BATCH_NORMS, FROZEN, INSTANCE_NORMS, SAMPLE_NORMS, normalizes_by_batch
from flatwater.paddle.running import layers_of, to_numpy
from flatwater.paddle.select import select
from flatwater.paddle.surgery.view import NORM_FORWARDS, norm_values
from flatwater.paddle.sync.layer import SyncBatchNorm
from flatwater.surgery import ChangeReport, check_statistics
from flatwater.surgery.frozen import FreezeReport, FrozenReport, departure

__all__ = [
    "BEFORE_CONVERT",
    "freeze",
    "freeze_layers",
    "frozen_parts",
    "frozen_report",
    "is_frozen",
    "thaw",
    "thaw_layers",
]

# Where a layer that convert(model, "frozen") froze keeps what of it was frozen before. Thawing forgets it.
BEFORE_CONVERT = "_flatwater_frozen_before_convert"

_STATISTICS = ("_mean", "_variance")


@dataclass
class _Memory:
    """What a frozen layer was like.

    Attributes:
        flags: ``stop_gradient`` of γ and β, by name, before they were frozen first.
        settings: the attributes that freezing the statistics replaced, among them its class.
        copies: everything frozen, by name, as it was when it was frozen first.
        behind_reducer: which of γ and β were trainable until they were frozen through the DataParallel that averages
            their gradients.
    """

    flags: dict[str, bool] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    copies: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    behind_reducer: set[str] = field(default_factory=set)

    def unreduced(self, names: Set[str]) -> set[str]:
        """Which of these, once thawed, would be trained without the DataParallel averaging their gradients."""
        trainable = {name for name in names & self.flags.keys() if not self.flags[name]}
        return trainable - self.behind_reducer

    def without(self, names: Set[str]) -> _Memory | None:
        """The same, but for these tensors (the settings are the statistics'); None if nothing else is frozen."""
        copies = {name: copy for name, copy in self.copies.items() if name not in names}
        flags = {name: flag for name, flag in self.flags.items() if name not in names}
        settings = {} if "_mean" in names else self.settings
        return _Memory(flags, settings, copies, self.behind_reducer - names) if copies else None


def freeze(
    model: paddle.nn.Layer,
    *,
    affine: bool = True,
    statistics: bool = True,
    weight: bool | None = None,
    bias: bool | None = None,
    pattern: str | Sequence[str] | None = None,
) -> FreezeReport:
    """Stop the norm layers of ``model`` from learning, in place. Doing it twice is doing it once.

    Frozen γ and β get no gradient, and so no step, weight decay or momentum of any optimizer; a gradient that is
    left from the last step is dropped. (An optimizer with ``use_multi_tensor=True`` that has taken a step already
    fails on the next, for it goes on expecting the gradients: make it anew.) Frozen statistics normalize in
    ``train()`` as in ``eval()``, and stay. The ``state_dict`` has the keys that it had; freezing is not in it, but
    in the model, its copies and its pickles. What ``to_static`` captured of ``model`` is captured anew at the next
    call; if it was captured as a part of something larger, give that.

    Args:
        affine: freeze γ and β (``stop_gradient = True``), of every kind of norm layer.
        statistics: freeze the moving mean and variance of batch norms (``_use_global_stats = True``). Paddle's own
            SyncBatchNorm ignores that setting, and so is Flatwater's of that name while it is frozen.
        weight, bias: freeze γ or β by itself; None for what ``affine`` says.
        pattern: a glob, or several, one of which a layer's path must match (``"backbone.*"``); None for every layer.

    Returns:
        The paths changed, why others were left, and what was asked for but layers of some kind have not.

    Raises:
        SurgeryError: nothing was asked for, no norm layer matches or none has what was asked for, or the model is a
            DataParallel over several processes that cannot do without a gradient of each parameter. As with the
            next, nothing was changed.
        StatisticsError: the running statistics to freeze are NaN, infinite or negative.
    """
    weight, bias = (affine if own is None else own for own in (weight, bias))
    if not (weight or bias or statistics):
        raise SurgeryError("freeze() was asked for neither γ, β nor statistics; set one of them to True")
    return freeze_layers(model, _matching(model, pattern), weight=weight, bias=bias, statistics=statistics)


def freeze_layers(
    model: paddle.nn.Layer, layers: Mapping[str, Any], *, weight: bool, bias: bool, statistics: bool
) -> FreezeReport:
    """What :func:`freeze` does, of these norm layers of ``model``, by the paths to report them by."""
    report = FreezeReport()
    chosen = _choose(layers, report, weight=weight, bias=bias, statistics=statistics)
    reduces = _reduces(model)
    if reduces and (weight or bias) and not model.find_unused_parameters:
        raise SurgeryError(
            "this DataParallel waits for a gradient of each parameter that was trainable when it was made; freeze "
            "before wrapping, or wrap with find_unused_parameters=True"
        )
    recorded = _recorded_flags(model)
    for path, layer, wanted in chosen:
        if _freeze(layer, wanted, recorded, behind_reducer=reduces):
            report.changed.append(path)
            if "_mean" in wanted and _has_own_forward(layer):
                report.notes[path] = (
                    f"{type(layer).__name__} has a forward of its own, which need not look at use_global_stats; "
                    "whether its statistics stand still is seen from frozen_report() after a step"
                )
        else:
            report.left[path] = "is frozen already"
    if report.changed:
        capture_anew(model)
    return report


def thaw(model: paddle.nn.Layer, *, pattern: str | Sequence[str] | None = None) -> ChangeReport:
    """Undo :func:`freeze`: each layer gets back exactly the settings that it had before it was frozen first.

    What was frozen before that stays frozen, and so does a parameter that another frozen layer shares.

    Raises:
        SurgeryError: no norm layer matches ``pattern``, or the model is a DataParallel that was made when parameters
            to be thawed were frozen, so that it would not average their gradients; nothing was changed.
    """
    return thaw_layers(model, _matching(model, pattern))


def thaw_layers(
    model: paddle.nn.Layer,
    layers: Mapping[str, Any],
    *,
    weight: bool = True,
    bias: bool = True,
    statistics: bool = True,
) -> ChangeReport:
    """What :func:`thaw` does, of these norm layers of ``model``, by the paths to report them by.

    Args:
        weight, bias, statistics: what of them; the rest stays frozen, since when it was.
    """
    report = ChangeReport()
    names = ({"weight", "scale"} if weight else set()) | ({"bias"} if bias else set())
    names |= set(_STATISTICS) if statistics else set()
    frozen = []
    for path, layer in layers.items():
        memory = _memory_of(layer)
        if memory is not None and names & memory.copies.keys():
            frozen.append((path, layer, memory))
        else:
            report.left[path] = "is not frozen" if memory is None else "what was to be thawed of it is not frozen"
    if _reduces(model) and any(memory.unreduced(names) for _, _, memory in frozen):
        raise SurgeryError(
            "this DataParallel was made when γ or β were frozen, and would not average their gradients; thaw the "
            "model that it wraps, and wrap it again"
        )
    for _, layer, memory in frozen:
        layer.__dict__.pop(BEFORE_CONVERT, None)
        del layer.__dict__[FROZEN]
        if rest := memory.without(names):
            layer.__dict__[FROZEN] = rest
    shared = _recorded_flags(model)
    for path, layer, memory in frozen:
        for name in names & memory.flags.keys():
            parameter = getattr(layer, name)
            if parameter is not None and id(parameter) not in shared:
                parameter.stop_gradient = memory.flags[name]
        for name, value in memory.settings.items() if statistics else ():
            setattr(layer, name, value)
        if _is_stock(layer):
            layer.__dict__.pop("_accepted", None)  # what the layer looked up while it was ours
        report.changed.append(path)
    if report.changed:
        capture_anew(model)
    return report


def frozen_report(model: paddle.nn.Layer) -> FrozenReport:
    """Prove that nothing frozen moved: every value is compared, bit by bit, with the copy that :func:`freeze` took.

    A checkpoint that was loaded since counts as a movement, unless its values are the same. To freeze the loaded
    values, thaw and freeze. A layer that was taken out of the model, by folding for instance, is not looked at.

    Raises:
        SurgeryError: nothing in the model is frozen.
    """
    report = FrozenReport()
    for path, layer in layers_of(model):
        memory = _memory_of(layer)
        for name, copy in memory.copies.items() if memory else ():
            full_name = f"{path}.{name}" if path else name
            tensor = getattr(layer, name, None)
            if tensor is None:
                report.released[full_name] = "the layer has it no longer"
                continue
            reason = _release(layer, name, tensor)
            if reason:
                report.released[full_name] = reason
            # As exact as the tensor now is: in NumPy a bfloat16 is a float32.
            cast = to_numpy(paddle.to_tensor(copy).astype(tensor.dtype))
            found = departure(cast, to_numpy(tensor))
            if found:
                report.moved[full_name] = found
            else:
                report.held.append(full_name)
    if not (report.held or report.moved or report.released):
        raise SurgeryError(f"nothing in the {type(model).__name__} was frozen by freeze(); freeze something first")
    return report


def is_frozen(layer: paddle.nn.Layer) -> bool:
    """Whether :func:`freeze` froze something of this layer, and nobody thawed it."""
    return _memory_of(layer) is not None


def frozen_parts(layer: paddle.nn.Layer) -> tuple[bool, bool, bool]:
    """Whether :func:`freeze` froze γ, β and the statistics of this layer."""
    memory = _memory_of(layer)
    copies = memory.copies if memory else ()
    return "weight" in copies or "scale" in copies, "bias" in copies, "_mean" in copies


def _choose(
    layers: Mapping[str, Any], report: FreezeReport, *, weight: bool, bias: bool, statistics: bool
) -> list[tuple[str, paddle.nn.Layer, list[str]]]:
    """The layers to freeze, each with the names of its tensors to freeze; what stays out is noted."""
    chosen = []
    for path, layer in layers.items():
        wanted, missing = _parts(layer, weight=weight, bias=bias, statistics=statistics)
        lacks = f"{type(layer).__name__} has no {' and no '.join(missing)}"
        if not wanted:
            report.left[path] = lacks
            continue
        if "_mean" in wanted and _ignores_setting(layer):
            report.left[path] = (
                f"{type(layer).__name__} is a subclass of Paddle's SyncBatchNorm with a forward of its own, which "
                "cannot be told to use its running statistics in train(); freeze it with statistics=False"
            )
            continue
        if missing:
            report.lacking[path] = lacks
        if "_mean" in wanted:
            check_statistics(path, norm_values(layer))
        chosen.append((path, layer, wanted))
    if not chosen:
        path, reason = next(iter(report.left.items()))
        raise SurgeryError(f"no norm layer has what freeze() was asked for; {path!r}: {reason}")
    return chosen


def _matching(model: paddle.nn.Layer, pattern: str | Sequence[str] | None) -> dict[str, Any]:
    """The norm layers that ``pattern`` selects."""
    kinds = (*BATCH_NORMS, *SAMPLE_NORMS)
    return select(model, lambda layer: isinstance(layer, kinds), pattern, "norm layer")


def _memory_of(layer: paddle.nn.Layer) -> _Memory | None:
    return layer.__dict__.get(FROZEN)


def _parts(layer: paddle.nn.Layer, *, weight: bool, bias: bool, statistics: bool) -> tuple[list[str], list[str]]:
    """The names of the layer's tensors that are to be frozen, and in words what it has not."""
    scale = "scale" if isinstance(layer, INSTANCE_NORMS) else "weight"
    asked = [(name, word) for name, word, want in ((scale, "γ", weight), ("bias", "β", bias)) if want]
    wanted = [name for name, _ in asked if getattr(layer, name) is not None]
    missing = [word for name, word in asked if getattr(layer, name) is None]
    if statistics and isinstance(layer, BATCH_NORMS):
        wanted += _STATISTICS
    elif statistics:
        missing.append("running statistics")
    return wanted, missing


def _has_own_forward(layer: paddle.nn.Layer) -> bool:
    """Whether nobody knows what the layer does; Paddle's own subclasses, as for sparse tensors, do what they should."""
    forward = type(layer).forward
    return forward not in NORM_FORWARDS and not forward.__module__.startswith("paddle.")


def _ignores_setting(layer: paddle.nn.Layer) -> bool:
    """Whether nothing makes the layer use its running statistics in ``train()``."""
    return isinstance(layer, paddle.nn.SyncBatchNorm) and not isinstance(layer, SyncBatchNorm) and not _is_stock(layer)


def _is_stock(layer: paddle.nn.Layer) -> bool:
    return type(layer) is paddle.nn.SyncBatchNorm


def _freeze(layer: Any, names: list[str], recorded: dict[int, bool], *, behind_reducer: bool) -> bool:
    """Whether anything had to be changed.

    Args:
        recorded: what ``stop_gradient`` was of frozen parameters, which layers may share; completed.
    """
    memory = _memory_of(layer) or _Memory()
    changed = False
    for name in names:
        tensor = getattr(layer, name)
        memory.copies.setdefault(name, to_numpy(tensor))
        if name in _STATISTICS:
            continue
        trainable = not recorded.setdefault(id(tensor), tensor.stop_gradient)
        if behind_reducer and trainable and (name not in memory.flags or not tensor.stop_gradient):
            memory.behind_reducer.add(name)
        memory.flags.setdefault(name, not trainable)
        if not tensor.stop_gradient:
            tensor.stop_gradient = True
            tensor.clear_gradient(False)  # clear_grad() passes frozen parameters by
            changed = True
    if "_mean" in names and (layer._use_global_stats is not True or _is_stock(layer)):
        memory.settings.setdefault("_use_global_stats", layer._use_global_stats)
        layer._use_global_stats = True
        if _is_stock(layer):
            memory.settings.setdefault("__class__", type(layer))
            layer.__class__ = SyncBatchNorm
        changed = True
    layer.__dict__[FROZEN] = memory
    return changed


def _recorded_flags(model: paddle.nn.Layer) -> dict[int, bool]:
    """What ``stop_gradient`` was of each frozen parameter of the model, by ``id``."""
    return {
        id(getattr(layer, name)): flag
        for _, layer in layers_of(model)
        if (memory := _memory_of(layer)) is not None
        for name, flag in memory.flags.items()
    }


def _release(layer: paddle.nn.Layer, name: str, tensor: paddle.Tensor) -> str | None:
    """Why a tensor that was frozen no longer is."""
    if name not in _STATISTICS:
        return None if tensor.stop_gradient else "its stop_gradient is False"
    if normalizes_by_batch(layer, training=True):
        return f"in train() the {type(layer).__name__} normalizes by the batch again"
    return None


def _reduces(model: paddle.nn.Layer) -> bool:
    """Whether the model is a DataParallel that averages gradients over processes."""
    return isinstance(model, paddle.DataParallel) and model._strategy.nranks > 1
