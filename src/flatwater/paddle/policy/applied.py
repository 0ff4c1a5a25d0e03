"""A policy that was applied: its report, what of it is still to come, and what optimizers have to know of it."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import paddle
from paddle.regularizer import L2Decay

from flatwater.errors import ConfigError, SurgeryError
from flatwater.momentum import Unit
from flatwater.paddle.captured import capture_anew
from flatwater.paddle.choosing.schedule import MomentumSchedule
from flatwater.paddle.running import layers_of
from flatwater.paddle.surgery.freeze import freeze_layers, frozen_parts, thaw_layers
from flatwater.paddle.surgery.snapshot import Snapshot
from flatwater.surgery.applied import PolicyReport

if TYPE_CHECKING:
    from flatwater.policy import Freeze, Momentum

__all__ = [
    "AppliedPolicy",
    "Learning",
    "PolicyCallback",
    "float32_layers",
    "mark_float32",
    "set_frozen",
    "thaws_more",
]

# The mark in layers that are to stay float32. Paddle has one of its own, which it gives to other layers as well.
_KEEP_FLOAT32 = "_flatwater_keep_float32"


@dataclass
class Learning:
    """How γ and β of one layer learn, where a policy says so.

    Attributes:
        weight_decay: their own L2 coefficient.
        factor: their share of the learning rate.
    """

    parameters: list[Any]
    weight_decay: float | None = None
    factor: float | None = None

    def set(self) -> None:
        """Where ``paddle.optimizer`` looks, at every step: SGD, Momentum, Adam and all others but AdamW and Lamb."""
        for parameter in self.parameters:
            if self.weight_decay is not None:
                parameter.regularizer = L2Decay(self.weight_decay)
            if self.factor is not None:
                parameter.optimize_attr = {**parameter.optimize_attr, "learning_rate": self.factor}


@dataclass
class AppliedPolicy(PolicyReport):
    """What :func:`~flatwater.paddle.apply_policy` returns. ``str()`` gives a table of all norm layers.

    What a policy freezes from a step or an epoch on, and momentum that follows a schedule, need to be told when: by
    ``callback()`` in ``paddle.Model.fit``, or by ``on_step`` and ``on_epoch`` in a loop of one's own. (For a model in
    ``paddle.DataParallel``, apply the policy to that, made with ``find_unused_parameters=True``: it must not wait for
    gradients that no longer come. What copies the model, as quantization may, copies what is frozen and set, but of
    what is to come only the model knows that the policy was applied to.)
    """

    model: Any = field(default=None, repr=False)
    _pending: list[tuple[Freeze, dict[str, Any]]] = field(default_factory=list, repr=False)
    _schedules: list[tuple[Momentum, MomentumSchedule]] = field(default_factory=list, repr=False)
    _learning: list[Learning] = field(default_factory=list, repr=False)
    _before: Snapshot | None = field(default=None, repr=False)

    def on_step(self, step: int) -> None:
        """Tell that step ``step`` begins, counted from 0 over all epochs; in a resumed run, the step it goes on with.

        Raises:
            StatisticsError: the statistics to freeze now are NaN, infinite or negative; nothing was frozen.
            SurgeryError: a layer to freeze now is no longer in the model, or one whose momentum follows a schedule was
                captured by ``to_static(full_graph=True)``.
        """
        self._freeze_due(lambda when: when.from_step is not None and when.from_step <= step)
        self._follow_to(step, "step")

    def on_epoch(self, epoch: int) -> None:
        """Tell that epoch ``epoch`` begins, counted from 0. Raises what :meth:`on_step` raises."""
        self._freeze_due(lambda when: when.from_epoch is not None and when.from_epoch <= epoch)
        self._follow_to(epoch, "epoch")

    def callback(self, step: int = 0, epoch: int = 0) -> PolicyCallback:
        """For ``paddle.Model.fit``, whose first step and epoch are these of the whole training.

        Both are counted on over further calls of ``fit`` that get the same callback.
        """
        return PolicyCallback(self, step, epoch)

    def decays(self, parameter: Any) -> bool:
        """Whether weight decay is for this parameter: False for those to which the policy gives none.

        Made for ``AdamW(..., apply_decay_param_fun=applied.decays)``, which decouples the decay from the gradient and
        therefore asks no regularizer; it gives a name. Lamb gives the parameter, and wants to hear the opposite.
        """
        name = parameter if isinstance(parameter, str) else parameter.name
        return name not in self._without_decay()

    def prepare(self, optimizer: Any) -> None:
        """Make sure that the policy's weight decay and learning rates reach an optimizer that is there already.

        SGD, Momentum, Adam and the like find them in the parameters, unless they were given parameter groups, which
        write over them when the optimizer is made; AdamW and Lamb have to be told. A second call changes nothing.

        Raises:
            ConfigError: AdamW and Lamb decay all parameters alike or not at all, so a coefficient of one's own above 0
                is not to be had.
        """
        for learning in self._learning:
            learning.set()
        known = {paddle.optimizer.AdamW: "apply_decay_param_fun", paddle.optimizer.Lamb: "exclude_from_weight_decay_fn"}
        function = next((name for kind, name in known.items() if isinstance(optimizer, kind)), None)
        if function is None:
            return
        own = [learning for learning in self._learning if learning.weight_decay]
        if own:
            raise ConfigError(
                f"weight_decay={own[0].weight_decay} of {own[0].parameters[0].name!r} cannot reach "
                f"{type(optimizer).__name__}, which decays parameters alike or not at all; use 0, or another optimizer"
            )
        spared, excludes = self._without_decay(), function.startswith("exclude")
        setattr(optimizer, f"_{function}", _told(getattr(optimizer, f"_{function}"), spared, excludes=excludes))
        for group in (optimizer._default_dict, *optimizer._param_groups):
            if isinstance(group, dict) and function in group:
                group[function] = _told(group[function], spared, excludes=excludes)

    def undo(self) -> None:
        """Make the norm layers bit for bit what they were before the policy, whatever was trained since.

        Modes (``train()``, ``eval()``), gradients, dtypes and what ``to_static`` put into a layer stay as they are now,
        and an optimizer that :meth:`prepare` told goes on decaying as it was told.

        Raises:
            SurgeryError: it was undone already.
        """
        if self._before is None:
            raise SurgeryError("this policy was undone already; apply it again first")
        self._before.restore(running=False)
        capture_anew(self.model)
        self._before = None
        self._pending.clear()
        self._schedules.clear()
        self._learning.clear()

    def learn(self, learning: Learning) -> None:
        """Set how some parameters learn, and remember it for :meth:`prepare`."""
        learning.set()
        self._learning.append(learning)

    def postpone(self, what: Freeze, layers: dict[str, Any]) -> None:
        """Freeze these layers, by path, when its step or epoch begins, wherever in the model they are then."""
        self._pending.append((what, layers))

    def follow(self, momentum: Momentum, paths: list[str]) -> None:
        """Let the momentum of the layers at these paths follow its schedule, from its beginning."""
        patterns = [glob.escape(path) for path in paths]
        schedule = MomentumSchedule(self.model, momentum.at, curve=momentum.curve, by=momentum.by, pattern=patterns)
        self._schedules.append((momentum, schedule))

    def _follow_to(self, position: int, unit: Unit) -> None:
        for momentum, schedule in self._schedules:
            if momentum.by == unit:
                schedule.step(position)

    def _without_decay(self) -> set[str]:
        spared = [learning for learning in self._learning if learning.weight_decay == 0]
        return {parameter.name for learning in spared for parameter in learning.parameters}

    def _freeze_due(self, is_due: Callable[[Freeze], bool]) -> None:
        due = [one for one in self._pending if is_due(one[0])]
        if not due:
            return
        before = Snapshot(layer for _, layers in due for layer in layers.values())
        try:
            for when, layers in due:
                set_frozen(self.model, when, layers)  # and whatever was frozen since stays so
        except BaseException:
            before.restore()
            raise
        self._pending = [one for one in self._pending if one not in due]


class PolicyCallback(paddle.callbacks.Callback):
    """Tells an applied policy when steps and epochs begin; see :meth:`AppliedPolicy.callback`."""

    def __init__(self, applied: AppliedPolicy, step: int = 0, epoch: int = 0) -> None:
        super().__init__()
        self._applied = applied
        self._step = step
        self._first_epoch = self._next_epoch = epoch

    def on_train_begin(self, logs: Any = None) -> None:
        self._first_epoch = self._next_epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # whose count begins at 0 in each fit()
        self._applied.on_epoch(self._first_epoch + epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._next_epoch = self._first_epoch + epoch + 1

    def on_train_batch_begin(self, step: int, logs: Any = None) -> None:
        self._applied.on_step(self._step)
        self._step += 1


def float32_layers(model: paddle.nn.Layer) -> list[paddle.nn.Layer]:
    """The layers that a policy said are to stay float32.

    Give them to ``paddle.amp.decorate(..., excluded_layers=float32_layers(model))`` (which leaves them be even without,
    for the policy sets what it looks at), or to the configuration of a quantization.
    """
    return [layer for _, layer in layers_of(model) if vars(layer).get(_KEEP_FLOAT32)]


def set_frozen(model: paddle.nn.Layer, what: Freeze, layers: Mapping[str, Any], *, only: bool = False) -> None:
    """Freeze of these layers what is to be, as far as they have it.

    Args:
        layers: by the paths that they had when the policy was applied.
        only: thaw what else is frozen of them.

    Raises:
        SurgeryError: a layer is no longer in the model.
    """
    present = {id(layer): path for path, layer in layers_of(model)}
    for path, layer in layers.items():
        if id(layer) not in present:
            raise SurgeryError(
                f"the {type(layer).__name__} that was at {path!r} is no longer in the {type(model).__name__}, so that "
                f"it cannot be frozen ({what}); apply the policy to the model as it is now"
            )
        one = {present[id(layer)]: layer}
        if only and thaws_more(layer, what):
            thaw_layers(model, one)
        freeze_layers(model, one, weight=what.affine, bias=what.affine, statistics=what.statistics)


def thaws_more(layer: Any, what: Freeze) -> bool:
    """Whether more of a layer is frozen than a policy says."""
    weight, bias, statistics = frozen_parts(layer)
    return ((weight or bias) and not what.affine) or (statistics and not what.statistics)


def mark_float32(layer: paddle.nn.Layer, *, keep: bool) -> None:
    """Set the mark that :func:`float32_layers` reads, and the one that Paddle's mixed precision does."""
    vars(layer)[_KEEP_FLOAT32] = keep
    layer._cast_to_low_precision = not keep


def _told(before: Callable[[Any], bool] | None, spared: set[str], *, excludes: bool) -> Callable[[Any], bool]:
    """An optimizer's function for decaying, or for excluding, that knows the parameters which are to have no decay."""

    def function(parameter: Any) -> bool:
        name = parameter if isinstance(parameter, str) else parameter.name
        if name in spared:
            return excludes
        return before(parameter) if before is not None else not excludes

    return function
