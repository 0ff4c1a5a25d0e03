"""How :func:`~flatwater.paddle.apply_policy` goes about it. Only this module needs what reads and checks policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paddle

from flatwater.advice import Batch, LayerAdvice
from flatwater.errors import ConfigError, InputError, SurgeryError
from flatwater.paddle.captured import capture_anew
from flatwater.paddle.choosing.advise import UNREACHED, advise_layer, why_it_stays
from flatwater.paddle.choosing.walk import batches_of, inputs_of
from flatwater.paddle.kinds import BATCH_NORMS
from flatwater.paddle.policy.applied import AppliedPolicy, Learning, mark_float32, set_frozen, thaws_more
from flatwater.paddle.policy.residual import block_ends
from flatwater.paddle.running import Inputs, layers_of
from flatwater.paddle.select import paths_of
from flatwater.paddle.surgery.freeze import is_frozen, thaw_layers
from flatwater.paddle.surgery.recast import affine_of, is_recast, kind_of, recast, restore
from flatwater.paddle.surgery.snapshot import Snapshot
from flatwater.policy import Chosen, Freeze, Momentum, NormInfo, Policy
from flatwater.surgery.applied import PolicyEntry

__all__ = ["apply_rules", "as_policy"]


def as_policy(policy: Policy | str | Path | Sequence[Mapping[str, Any]]) -> Policy:
    """The policy that was given, in whichever form.

    Raises:
        ConfigError: it is wrong in itself, or its file cannot be read.
    """
    if isinstance(policy, Policy):
        return policy
    return Policy.load(policy) if isinstance(policy, str | Path) else Policy.of(policy)


def apply_rules(
    model: paddle.nn.Layer, policy: Policy, *, inputs: Inputs | None, batch_size: int | None, world_size: int
) -> AppliedPolicy:
    """:func:`~flatwater.paddle.apply_policy` with everything in its final form."""
    norms: dict[str, Any] = {path: layer for path, layer in layers_of(model) if kind_of(layer) is not None}
    if not norms:
        raise ConfigError(f"the {type(model).__name__} has no norm layers, so that a policy has nothing to say of it")
    infos = {path: NormInfo(str(kind_of(layer)), type(layer).__name__) for path, layer in norms.items()}
    wanted = _resolve(policy, model, norms, infos)
    seen = _Seen()
    looks = any(fields.get("norm", _NOTHING).value == "auto" for fields in wanted.values())
    finds_ends = any(fields.get("zero_init_residual", _NOTHING).value for fields in wanted.values())
    if inputs is None and (looks or finds_ends):
        inputs = _inputs_of(policy, model, batch_size)
    if inputs is not None and looks:
        seen.batches = batches_of(model, norms, inputs)
    if inputs is not None and finds_ends:
        seen.block_ends = block_ends(
            model, {path: norms[path] for path, info in infos.items() if info.kind != "layer_norm"}, inputs
        )
    before = Snapshot(norms.values())
    work = _Work(policy, AppliedPolicy(model=model, _before=before), seen, batch_size, world_size)
    try:
        for path, layer in norms.items():
            work.change(path, layer, wanted.get(path, {}))
        work.check_effects(wanted)
        work.schedule()
        work.freeze()
        capture_anew(model)
    except BaseException:
        before.restore()
        raise
    return work.applied


def _resolve(
    policy: Policy, model: paddle.nn.Layer, norms: Mapping[str, Any], infos: Mapping[str, NormInfo]
) -> dict[str, dict[str, Chosen]]:
    """What the policy says of each layer; of one that is used in several places, at whichever of its paths."""
    everywhere = paths_of(model)
    paths = {first: everywhere[id(layer)] for first, layer in norms.items()}
    said = policy.resolve({path: infos[first] for first, several in paths.items() for path in several})
    wanted: dict[str, dict[str, Chosen]] = {}
    for first, several in paths.items():
        chosen = [item for path in several for item in said.get(path, {}).items()]
        if chosen:
            wanted[first] = dict(sorted(chosen, key=lambda item: item[1].rule))
    return wanted


def _inputs_of(policy: Policy, model: paddle.nn.Layer, batch_size: int | None) -> Inputs | None:
    """Inputs as the policy describes them, if it does."""
    if policy.training is None or not policy.training.input_spec:
        return None
    specs = [paddle.static.InputSpec(list(one.shape), one.dtype) for one in policy.training.input_spec]
    try:
        return inputs_of(model, specs, batch_size)
    except (InputError, SurgeryError) as error:
        raise type(error)(f"the policy's training section: {error}") from error


_NOTHING = Chosen(None, 0)
_MOMENTA = {"momentum", "momentum_schedule"}
# What not every kind of norm has. Where ``auto`` has chosen the kind, it may be in vain: on other devices, or of a
# larger batch, the same policy has the kind that it is for.
_OF_A_KIND = {*_MOMENTA, "groups", "freeze"}


@dataclass
class _Seen:
    """What the inputs showed; None for what was not looked at."""

    batches: dict[str, Batch] | None = None
    block_ends: set[str] | None = None


class _InapplicableError(Exception):
    """A layer has nothing that a field could set. An error only if that is so for every layer that the rule is for."""


class _Work:
    def __init__(
        self, policy: Policy, applied: AppliedPolicy, seen: _Seen, batch_size: int | None, world_size: int
    ) -> None:
        self.policy = policy
        self.applied = applied
        self._seen = seen
        self._batch_size = batch_size
        self._world_size = world_size
        self._frozen: dict[Freeze, dict[str, Any]] = {}
        self._schedules: dict[tuple[object, ...], tuple[Momentum, list[str]]] = {}
        self._zeroed: set[str] = set()
        self._chosen_by_auto: set[str] = set()
        self._effects: set[tuple[int, str]] = set()
        self._reasons: dict[tuple[int, str], str] = {}
        # In the order in which they are done.
        self._setters: dict[str, Callable[[PolicyEntry, Any, dict[str, Chosen]], str | None]] = {
            "norm": self._set_norm,
            "groups": self._set_groups,
            "momentum": self._set_momentum,
            "momentum_schedule": self._set_schedule,
            "epsilon": self._set_epsilon,
            "gamma": self._set_gamma,
            "beta": self._set_beta,
            "zero_init_residual": self._set_zero_init,
            "weight_decay": self._set_weight_decay,
            "learning_rate_factor": self._set_factor,
            "keep_float32": self._set_float32,
            "freeze": self._set_freeze,
        }

    def change(self, path: str, layer: Any, fields: dict[str, Chosen]) -> None:
        """Do to one layer whatever the fields say; freezing comes last, and to all layers."""
        entry = PolicyEntry(path, type(layer).__name__, "")
        # Thawing comes first, for a frozen layer cannot be made another kind of norm.
        thaws = "freeze" in fields and fields["freeze"].value.what == "none"
        thaws = thaws and fields.get("norm", _NOTHING).value != "frozen"
        names = ["freeze", *self._setters] if thaws else list(self._setters)
        for name in dict.fromkeys(names):
            if name not in fields:
                continue
            setter = self._setters[name]
            rule = fields[name].rule
            try:
                done = setter(entry, layer, fields)
            except _InapplicableError as error:
                self._reasons[rule, name] = f"{path!r}: {error}"
                if name in _OF_A_KIND and path in self._chosen_by_auto:
                    self._effects.add((rule, name))
                if name != "zero_init_residual":  # which is for few layers by its nature
                    entry.notes.append(str(error))
                continue
            except SurgeryError as error:
                value = fields[name].value
                raise ConfigError(f"{self.policy.place(rule, name)}: {name}={value} for {path!r}: {error}") from error
            self._effects.add((rule, name))
            if done:
                entry.done.append(f"{done} ({self.policy.place(rule, name)})")
        entry.kind = type(layer).__name__
        self.applied.entries.append(entry)

    def check_effects(self, wanted: dict[str, dict[str, Chosen]]) -> None:
        """Raise ConfigError for what a rule sets, and no later rule overrides, where no layer has such a thing."""
        decisive = {(chosen.rule, name) for fields in wanted.values() for name, chosen in fields.items()}
        for rule, name in sorted(decisive - self._effects):
            raise ConfigError(
                f"{self.policy.place(rule, name)}: {name} has no effect on any layer that the rule is for; "
                f"{self._reasons[rule, name]}"
            )

    def schedule(self) -> None:
        """Let the momenta follow their schedules, from the first step and epoch on."""
        for momentum, paths in self._schedules.values():
            self.applied.follow(momentum, paths)

    def freeze(self) -> None:
        """Freeze what is to be frozen now, and keep the rest for later."""
        for what, layers in self._frozen.items():
            if what.now:
                set_frozen(self.applied.model, what, layers, only=True)
            else:
                self.applied.postpone(what, layers)

    def _set_norm(self, entry: PolicyEntry, layer: Any, fields: dict[str, Chosen]) -> str | None:
        wanted, groups, why = fields["norm"].value, None, ""
        if wanted == "auto":
            advice = self._advise(entry.path, layer, fields["norm"].rule)
            self._chosen_by_auto.add(entry.path)
            wanted, groups, why = advice.use, advice.groups, f", by auto: {advice.reason}"
            if wanted == "batch_norm" and advice.momentum is not None and not _MOMENTA & fields.keys():
                why += f"; {_set_attribute(layer, 'momentum', advice.momentum)}"
        if wanted == "frozen":
            return self._set_frozen(entry, layer, fields)
        if wanted == "group_norm" and "groups" in fields:
            groups = fields["groups"].value
        before = type(layer), getattr(layer, "_num_groups", None)
        note = recast(layer, wanted, groups=groups)
        if note:
            entry.notes.append(note)
        if (type(layer), getattr(layer, "_num_groups", None)) == before and not why:
            return None
        return f"norm {wanted}{why}"

    def _advise(self, path: str, layer: Any, rule: int) -> LayerAdvice:
        staying = why_it_stays(layer)
        if staying is not None:
            raise _InapplicableError(f"auto leaves what {staying}")
        where = self.policy.place(rule, "norm")
        if self._seen.batches is not None:
            if path not in self._seen.batches:
                raise _InapplicableError(f"auto leaves it, for {UNREACHED}; give it a kind of its own if it is used")
            return advise_layer(path, layer, self._seen.batches[path], self._world_size)
        if self._batch_size is None:
            raise ConfigError(f"{where}: norm=auto needs to know the batch; give inputs=, input_spec= or batch_size=")
        return advise_layer(path, layer, Batch(self._batch_size), self._world_size)

    def _set_frozen(self, entry: PolicyEntry, layer: Any, fields: dict[str, Chosen]) -> str | None:
        if is_recast(layer) and not is_frozen(layer):
            restore(layer)
        if not isinstance(layer, BATCH_NORMS):
            raise SurgeryError(f"a {type(layer).__name__} has no moving statistics to freeze")
        later = fields.get("freeze")
        if later is None or later.rule < fields["norm"].rule:
            fields["freeze"] = Chosen(Freeze(what="both"), fields["norm"].rule)
        return None

    def _set_groups(self, entry: PolicyEntry, layer: Any, fields: dict[str, Chosen]) -> str | None:
        if kind_of(layer) != "group_norm":
            raise _InapplicableError(f"a {type(layer).__name__} has no groups")
        groups = fields["groups"].value
        before = layer._num_groups
        recast(layer, "group_norm", groups=groups)
        return f"groups {before} -> {groups}" if before != groups else f"groups {groups}"

    def _set_momentum(self, entry: PolicyEntry, layer: Any, fields: dict[str, Chosen]) -> str | None:
        if not isinstance(layer, BATCH_NORMS):
            raise _InapplicableError(f"a {type(layer).__name__} keeps no statistics, so no momentum")
        schedule = fields.get("momentum_schedule")
        if schedule is not None and schedule.rule > fields["momentum"].rule:
            return None
        return _set_attribute(layer, "momentum", fields["momentum"].value)

    def _set_schedule(self, entry: PolicyEntry, layer: Any, fields: dict[str, Chosen]) -> str | None:
        if not isinstance(layer, BATCH_NORMS):
            raise _InapplicableError(f"a {type(layer).__name__} keeps no statistics, so no momentum")
        schedule, rule = fields["momentum_schedule"]
        if "momentum" in fields and fields["momentum"].rule > rule:
            return None
        same = tuple(schedule.at.items()), schedule.curve, schedule.by
        self._schedules.setdefault(same, (schedule, []))[1].append(entry.path)
        return f"momentum {schedule}"

    def _set_epsilon(self, entry: PolicyEntry, layer: Any, fields: dict[str, Chosen]) -> str | None:
        return _set_attribute(layer, "epsilon", fields["epsilon"].value)

    def _set_gamma(self, entry: PolicyEntry, layer: Any, fields: dict[str, Chosen]) -> str | None:
        return _fill("γ", affine_of(layer)[0], layer, fields["gamma"].value)

    def _set_beta(self, entry: PolicyEntry, layer: Any, fields: dict[str, Chosen]) -> str | None:
        return _fill("β", affine_of(layer)[1], layer, fields["beta"].value)

    def _set_zero_init(self, entry: PolicyEntry, layer: Any, fields: dict[str, Chosen]) -> str | None:
        wanted, rule = fields["zero_init_residual"]
        if not wanted:
            return None
        if self._seen.block_ends is None:
            where = self.policy.place(rule, "zero_init_residual")
            raise ConfigError(f"{where}: where residual blocks end is seen from the dataflow only; give inputs=")
        if entry.path not in self._seen.block_ends:
            raise _InapplicableError("it is not the last norm of a residual block")
        done = _fill("γ", affine_of(layer)[0], layer, 0.0)
        self._zeroed.add(entry.path)
        return f"{done}, the last norm of a residual block"

    def _set_weight_decay(self, entry: PolicyEntry, layer: Any, fields: dict[str, Chosen]) -> str | None:
        decay = fields["weight_decay"].value
        self.applied.learn(Learning(_affine(layer), weight_decay=decay))
        return f"weight decay {decay:g}"

    def _set_factor(self, entry: PolicyEntry, layer: Any, fields: dict[str, Chosen]) -> str | None:
        factor = fields["learning_rate_factor"].value
        self.applied.learn(Learning(_affine(layer), factor=factor))
        return f"learning rate × {factor:g}"

    def _set_float32(self, entry: PolicyEntry, layer: Any, fields: dict[str, Chosen]) -> str | None:
        keep = fields["keep_float32"].value
        mark_float32(layer, keep=keep)
        return "stays float32" if keep else "may leave float32"

    def _set_freeze(self, entry: PolicyEntry, layer: Any, fields: dict[str, Chosen]) -> str | None:
        freeze: Freeze = fields["freeze"].value
        if freeze.what == "none":
            return "thawed" if thaw_layers(self.applied.model, {entry.path: layer}).changed else None
        affine = freeze.affine and any(tensor is not None for tensor in affine_of(layer))
        statistics = freeze.statistics and isinstance(layer, BATCH_NORMS)
        if not (affine or statistics):
            raise _InapplicableError(f"this {type(layer).__name__} has nothing to freeze of {freeze.what}")
        if affine and freeze.now and entry.path in self._zeroed:
            here, there = (self.policy.place(fields[name].rule, name) for name in ("freeze", "zero_init_residual"))
            raise ConfigError(f"{here}: freezes γ of {entry.path!r} at 0, which {there} makes it; drop one of them")
        self._frozen.setdefault(freeze, {})[entry.path] = layer
        if freeze.now and thaws_more(layer, freeze):
            entry.notes.append(f"freeze {freeze} is all that is frozen of it now; the rest is thawed")
        return (
            f"freeze {freeze}"
            if affine >= freeze.affine and statistics >= freeze.statistics
            else (f"freeze {freeze}, of which it has {'γ and β' if affine else 'the statistics'} only")
        )


def _set_attribute(layer: Any, name: str, value: float) -> str:
    before = getattr(layer, f"_{name}")
    setattr(layer, f"_{name}", value)
    return f"{name} {before:g} -> {value:g}" if before != value else f"{name} {value:g}"


def _fill(name: str, parameter: Any, layer: Any, value: float) -> str:
    if parameter is None:
        raise _InapplicableError(f"this {type(layer).__name__} has no {name}")
    parameter.set_value(paddle.full_like(parameter, value))
    return f"{name} = {value:g}"


def _affine(layer: Any) -> list[Any]:
    present = [tensor for tensor in affine_of(layer) if tensor is not None]
    if not present:
        raise _InapplicableError(f"this {type(layer).__name__} has neither γ nor β")
    return present
