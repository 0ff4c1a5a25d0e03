"""The policy: what the norm layers of a model should be, as rules that are checked before anything is touched.

    - match: "backbone.*"             # rules later in the list override earlier ones, field by field
      norm: batch_norm
      freeze: statistics
    - match: ["neck.*", "head.*"]
      norm: group_norm
      groups: 8
      weight_decay: 0

:func:`flatwater.paddle.apply_policy` applies it. Which layers a rule is for:

========================  ===============================================================================
``match``                 a glob, or several, one of which the layer's path must match; all layers without
``kind``                  a kind of the next table, or a glob for the name of the class, or several of these
========================  ===============================================================================

In globs ``*`` stands for dots too. Rules look at the layers as they were before the policy.

What it sets; names that PaddleDetection's users know are understood as well, but not both in one rule:

==========================  ===================================  ===========================================
field                       of PaddleDetection                   values
==========================  ===================================  ===========================================
``norm``                    ``norm_type``: bn, sync_bn, gn       ``batch_norm``, ``sync_batch_norm``,
                                                                 ``group_norm``, ``instance_norm``,
                                                                 ``frozen`` (batch norm with both frozen),
                                                                 ``auto`` (see :mod:`flatwater.advice`)
``groups``                                                       of group norm; 32, or the largest power of
                                                                 two below it that divides the channels and leaves
                                                                 each group two of them
``momentum``                                                     share of the OLD statistics kept, 0 to 1
``momentum_schedule``                                            ``{at: {0: 0.5, 1000: 0.99}}``, by step; with
                                                                 ``curve``: ``linear``, ``cosine``, ``constant``;
                                                                 ``by``: ``step``, ``epoch``
``epsilon``                                                      above 0
``gamma``, ``beta``                                              initial values, written over what is there
``zero_init_residual``                                           true: γ = 0 in the last norm of each
                                                                 residual block (Goyal et al., 2017)
``weight_decay``            ``norm_decay``                       γ's and β's own L2 coefficient; 0 or false
                                                                 for none
``learning_rate_factor``                                         γ's and β's share of the learning rate
``freeze``                  ``freeze_norm``: true, false         ``affine``, ``statistics``, ``both``,
                                                                 ``none``; or ``{what: both, from_step: 100}``
                                                                 or ``from_epoch``, counted from 0
``keep_float32``                                                 true: mixed precision leaves it float32
==========================  ===================================  ===========================================

Rules that look at the model run (``norm: auto``, ``zero_init_residual``) need to know on what; unless that is said in
code, the policy can say it, with the rules under ``rules:``

    training:
      batch_size: 2                                   # samples on one device
      world_size: 4                                   # devices that share statistics; as many as there are without
      input_spec:
      - {shape: [null, 3, 224, 224], dtype: float32}  # null: the batch, and sizes that are free
    rules:
    - norm: auto
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from flatwater.errors import ConfigError, InputError
from flatwater.lined import LinedDict, parse_yaml, read_yaml
from flatwater.momentum import Curve, MomentumCurve, Unit
from flatwater.settings import contradiction, explain

__all__ = ["Chosen", "ExampleInput", "Freeze", "Momentum", "NormInfo", "NormType", "Policy", "Rule", "Training"]

NormType: TypeAlias = Literal["batch_norm", "sync_batch_norm", "group_norm", "instance_norm", "frozen", "auto"]

_ALIASES = {"norm": "norm_type", "freeze": "freeze_norm", "weight_decay": "norm_decay"}
_NORM_TYPES = {"bn": "batch_norm", "sync_bn": "sync_batch_norm", "gn": "group_norm"}
_NUMBERS = ("groups", "momentum", "epsilon", "gamma", "beta", "weight_decay", "learning_rate_factor")
_SELECTORS = ("match", "kind")
_KINDS = ("batch_norm", "sync_batch_norm", "group_norm", "instance_norm", "layer_norm")
_WITHOUT_STATISTICS = ("group_norm", "instance_norm")


class NormInfo(NamedTuple):
    """What rules look at, beside a layer's path.

    Attributes:
        kind: ``batch_norm``, ``sync_batch_norm``, ``group_norm``, ``instance_norm`` or ``layer_norm``.
        class_name: of the layer.
    """

    kind: str
    class_name: str


class Chosen(NamedTuple):
    """What a field is for one layer, and the number of the rule that said so last."""

    value: Any
    rule: int


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Freeze(_Model):
    """What stops learning, and when: at once, or from a step or an epoch on, counted from 0.

    At once it is a state: what else was frozen of a layer is thawed. Later it adds to what is frozen then.
    """

    what: Literal["affine", "statistics", "both", "none"]
    from_step: int | None = Field(default=None, ge=0)
    from_epoch: int | None = Field(default=None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _one_word(cls, data: Any) -> Any:
        if isinstance(data, bool):
            data = "both" if data else "none"
        return {"what": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _consistent(self) -> Freeze:
        if self.from_step is not None and self.from_epoch is not None:
            raise contradiction("from_step and from_epoch contradict each other; keep one of them", "from_epoch")
        if self.what == "none" and not self.now:
            raise contradiction("none is not frozen from any time on; drop that, or say what to freeze", "what")
        return self

    @model_serializer
    def _short(self) -> Any:
        parts = {"what": self.what, "from_step": self.from_step, "from_epoch": self.from_epoch}
        return self.what if self.now else {name: value for name, value in parts.items() if value is not None}

    @property
    def now(self) -> bool:
        """Whether it is frozen from the beginning."""
        return self.from_step is None and self.from_epoch is None

    @property
    def affine(self) -> bool:
        """Whether γ and β are frozen."""
        return self.what in ("affine", "both")

    @property
    def statistics(self) -> bool:
        """Whether the moving statistics are frozen."""
        return self.what in ("statistics", "both")

    def __str__(self) -> str:
        when = "" if self.now else f" from step {self.from_step}"
        return f"{self.what}{f' from epoch {self.from_epoch}' if self.from_epoch is not None else when}"


class Momentum(_Model):
    """A momentum that follows a curve, see :class:`~flatwater.momentum.MomentumCurve`."""

    at: dict[int, float]
    curve: Curve = "linear"
    by: Unit = "step"

    @model_validator(mode="after")
    def _checked(self) -> Momentum:
        try:
            MomentumCurve(self.at, self.curve, self.by)
        except InputError as error:
            raise contradiction(str(error), "at") from error
        return self

    def __str__(self) -> str:
        places = ", ".join(f"{momentum:g} at {self.by} {place}" for place, momentum in sorted(self.at.items()))
        return f"{places}, {self.curve} between"


class ExampleInput(_Model):
    """One input of the model; None for the batch, and for sizes that are free."""

    shape: tuple[int | None, ...] = Field(min_length=1)
    dtype: str = "float32"


class Training(_Model):
    """What rules look at that look at the model run, where code does not say it; see the module."""

    batch_size: int | None = Field(default=None, ge=1)
    world_size: int | None = Field(default=None, ge=1)
    input_spec: tuple[ExampleInput, ...] = ()


class Rule(_Model):
    """Settings for the layers that match; what is None it does not say. The module describes the fields."""

    match: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    norm: NormType | None = Field(default=None, validation_alias=AliasChoices("norm", "norm_type"))
    groups: int | None = Field(default=None, ge=1)
    momentum: float | None = Field(default=None, ge=0, le=1)
    momentum_schedule: Momentum | None = None
    epsilon: float | None = Field(default=None, gt=0)
    gamma: float | None = None
    beta: float | None = None
    zero_init_residual: bool | None = Field(default=None, strict=True)
    weight_decay: float | None = Field(default=None, ge=0, validation_alias=AliasChoices("weight_decay", "norm_decay"))
    learning_rate_factor: float | None = Field(default=None, ge=0)
    freeze: Freeze | None = Field(default=None, validation_alias=AliasChoices("freeze", "freeze_norm"))
    keep_float32: bool | None = Field(default=None, strict=True)

    _origin: LinedDict | None = PrivateAttr(default=None)

    @model_validator(mode="wrap")
    @classmethod
    def _remember_lines(cls, data: Any, validate: Any) -> Rule:
        for own, theirs in _ALIASES.items() if isinstance(data, Mapping) else ():
            if own in data and theirs in data:
                raise contradiction(f"{own} and {theirs} are two names of one setting; keep one of them", theirs)
        rule: Rule = validate(data)
        if isinstance(data, LinedDict):
            rule._origin = data
        if not rule.settings():
            raise ValueError(f"sets nothing; give it one of {', '.join(_FIELDS)}")
        for field, message in rule._contradictions():
            raise contradiction(message, rule._given_name(field))
        return rule

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        if self.groups is not None and self.norm not in (None, "group_norm", "auto"):
            yield "groups", f"groups={self.groups} contradicts norm={self.norm}, which has none"
        for name in ("momentum", "momentum_schedule"):
            if self.norm in _WITHOUT_STATISTICS and getattr(self, name) is not None:
                yield name, f"{name} contradicts norm={self.norm}, which keeps no statistics"
        if self.momentum is not None and self.momentum_schedule is not None:
            yield "momentum", "momentum contradicts momentum_schedule, which sets it; keep one of them"
        if self.norm in _WITHOUT_STATISTICS and self.freeze is not None and self.freeze.what == "statistics":
            yield "freeze", f"freeze=statistics contradicts norm={self.norm}, which keeps none"
        if self.norm == "frozen" and self.freeze is not None and str(self.freeze) != "both":
            yield "freeze", f"freeze={self.freeze} contradicts norm=frozen, which freezes both at once"
        at_once = self.norm == "frozen" or (self.freeze is not None and self.freeze.affine and self.freeze.now)
        if self.zero_init_residual and at_once:
            yield "zero_init_residual", "zero_init_residual contradicts freezing γ, which would stay 0"

    @field_validator(*_SELECTORS, mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        several = (value,) if isinstance(value, str) else value
        if isinstance(several, list | tuple) and not several:
            raise ValueError("is an empty list, which no layer matches; drop it, to mean all layers")
        return several

    @field_validator(*_NUMBERS, mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: Any) -> Any:
        if value is False and info.field_name == "weight_decay":
            return 0.0
        if isinstance(value, bool):
            raise ValueError(f"{'yes' if value else 'no'} is no number")
        return value

    @field_validator("norm", mode="before")
    @classmethod
    def _known_abbreviation(cls, value: Any) -> Any:
        return _NORM_TYPES.get(value, value) if isinstance(value, str) else value

    @model_serializer
    def _said(self) -> dict[str, Any]:
        selectors = {name: list(getattr(self, name)) for name in _SELECTORS if getattr(self, name)}
        said = {name: value.model_dump() if isinstance(value, _Model) else value for name, value in self.settings()}
        return {**selectors, **said}

    def __eq__(self, other: object) -> bool:
        """Whether it says the same, on whatever line."""
        return isinstance(other, Rule) and self.model_dump() == other.model_dump()

    def settings(self) -> list[tuple[str, Any]]:
        """The fields that the rule sets, with their values."""
        return [(name, value) for name in _FIELDS if (value := getattr(self, name)) is not None]

    def matches(self, path: str, norm: NormInfo) -> bool:
        """Whether the rule is for this layer."""
        by_path = not self.match or any(fnmatchcase(path, pattern) for pattern in self.match)
        return by_path and (not self.kind or any(_is_kind(norm, pattern) for pattern in self.kind))

    def place(self, field: str | None = None) -> str | None:
        """The file and line of a field, under whichever name it was given, or else of the rule."""
        return None if self._origin is None else self._origin.place(field and self._given_name(field))

    def _given_name(self, field: str) -> str:
        theirs = _ALIASES.get(field, field)
        return theirs if self._origin is not None and theirs in self._origin else field


_FIELDS = tuple(name for name in Rule.model_fields if name not in _SELECTORS)


class Policy(_Model):
    """Rules, in the order in which they override each other.

    Args:
        rules: :class:`Rule` objects, or dicts of their fields.
        training: what rules look at that look at the model run; None if that is said in code.

    Raises:
        ConfigError: from :meth:`load`, :meth:`parse` and :meth:`of`; the constructor raises pydantic's ValidationError.
    """

    rules: tuple[Rule, ...] = Field(min_length=1)
    training: Training | None = None

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """From a YAML file that holds a list of rules, or that list under ``rules:``."""
        path = Path(path)
        return cls.of(read_yaml(path), str(path))

    @classmethod
    def parse(cls, text: str, source: str = "the policy") -> Policy:
        """From YAML text; ``source`` is what errors call it."""
        return cls.of(parse_yaml(text, source), source)

    @classmethod
    def of(cls, rules: Any, source: str = "the policy") -> Policy:
        """From plain data: a list of rules, or a dict with ``rules``."""
        document = {"rules": list(rules)} if isinstance(rules, list | tuple) else rules
        if not isinstance(document, dict):
            raise ConfigError(f"{source}: holds a {type(document).__name__}, not a list of rules; see flatwater.policy")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise ConfigError(explain(error, document, cls, source)) from error

    def place(self, rule: int, field: str | None = None) -> str:
        """Where that is said, for an error: ``"norms.yaml, line 7"``, or ``"rule 2"`` of a policy from code."""
        return self.rules[rule].place(field) or f"rule {rule + 1}"

    def resolve(self, norms: Mapping[str, NormInfo]) -> dict[str, dict[str, Chosen]]:
        """For each layer that a rule matches, by path: what each field is, the last rule that says so winning.

        Raises:
            ConfigError: a pattern, or a rule, that matches none of ``norms``.
        """
        resolved: dict[str, dict[str, Chosen]] = {}
        for number, rule in enumerate(self.rules):
            self._check_patterns(number, norms)
            matching = [path for path, norm in norms.items() if rule.matches(path, norm)]
            if not matching:
                raise ConfigError(
                    f"{self.place(number)}: no norm layer matches both match={list(rule.match)} and "
                    f"kind={list(rule.kind)}; correct one of them"
                )
            for path in matching:
                fields = resolved.setdefault(path, {})
                fields.update({name: Chosen(value, number) for name, value in rule.settings()})
        return resolved

    def _check_patterns(self, number: int, norms: Mapping[str, NormInfo]) -> None:
        rule = self.rules[number]
        for pattern in rule.match:
            if not any(fnmatchcase(path, pattern) for path in norms):
                close = difflib.get_close_matches(pattern, norms, n=1, cutoff=0.0)
                example = f", among them {close[0]!r}" if close else ""
                raise ConfigError(
                    f"{self.place(number, 'match')}: match={pattern!r} matches none of the {len(norms)} norm "
                    f"layers{example}; correct the pattern"
                )
        for pattern in rule.kind:
            if not any(_is_kind(norm, pattern) for norm in norms.values()):
                present = sorted({name for norm in norms.values() for name in norm})
                raise ConfigError(
                    f"{self.place(number, 'kind')}: kind={pattern!r} matches none of the {len(norms)} norm layers; "
                    f"there are {', '.join(present) or 'none'}"
                )


def _is_kind(norm: NormInfo, pattern: str) -> bool:
    return norm.kind == pattern if pattern in _KINDS else fnmatchcase(norm.class_name, pattern)
