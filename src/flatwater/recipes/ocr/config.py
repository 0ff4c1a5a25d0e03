"""The recipe's configuration: frozen, validated, and read from YAML.

    config = load("ocr.yaml", ["norm.momentum=0.95", "train.steps=400"])

What a file leaves out keeps its default; ``KEY=VALUE`` overrides go over the file, with VALUE read as YAML.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flatwater.errors import ConfigError
from flatwater.lined import LinedDict, read_yaml
from flatwater.policy import Rule
from flatwater.settings import contradiction, explain

__all__ = ["Config", "DataConfig", "ModelConfig", "NormConfig", "OptimizerConfig", "TrainConfig", "load"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        # YAML reads yes, no, on and off as truth values, which Python would take for 1 and 0.
        if isinstance(value, bool):
            raise ValueError(
                f"{'yes' if value else 'no'} is no value that any setting takes; quote it if text is meant"
            )
        return value


class ModelConfig(_Section):
    """The recogniser's widths; its depth and strides are fixed."""

    channels: tuple[int, int, int, int] = (32, 64, 128, 192)
    """Of the convolutions before the height is gone, from the image on."""
    features: int = Field(default=320, ge=1)
    """Of each time step, from which the classes are told."""

    @model_validator(mode="after")
    def _positive(self) -> ModelConfig:
        if min(self.channels) < 1:
            raise ValueError("every number of channels must be at least 1")
        return self


class NormConfig(_Section):
    """The layer between each convolution and its activation."""

    kind: Literal["batch_norm", "sync_batch_norm", "group_norm", "instance_norm", "auto", "none"] = "batch_norm"
    """``auto``: what :func:`flatwater.paddle.advise` makes of a rank's share of the smallest batch. Ranks that train
    ``sync_batch_norm`` share their statistics; of one process it is batch norm."""
    momentum: float = Field(default=0.9, ge=0, le=1)
    """Batch norm: the share of the old running statistics that each step keeps."""
    epsilon: float = Field(default=1e-5, gt=0)
    groups: int = Field(default=8, ge=1)
    """Group norm only; must divide every number of channels."""
    rules: tuple[Rule, ...] = ()
    """A policy that goes over all this, layer by layer; see :mod:`flatwater.policy`."""

    @model_validator(mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value  # norm=sync_batch_norm

    @model_validator(mode="after")
    def _rules_can_be_followed(self) -> NormConfig:
        if self.rules and self.kind == "none":
            raise contradiction(
                "rules contradict kind=none, which leaves them no norm layers; drop one of them", "rules"
            )
        for number, rule in enumerate(self.rules):
            if rule.freeze is not None and rule.freeze.from_epoch is not None:
                raise contradiction(
                    f"from_epoch={rule.freeze.from_epoch} never comes, for this training counts steps; use from_step",
                    *("rules", number, "freeze"),
                )
            if rule.momentum_schedule is not None and rule.momentum_schedule.by == "epoch":
                raise contradiction(
                    "by=epoch never comes, for this training counts steps; use by=step",
                    *("rules", number, "momentum_schedule"),
                )
        return self


class OptimizerConfig(_Section):
    """How the weights are changed. The rate rises linearly, then falls as a cosine to 1/100 of its peak."""

    kind: Literal["momentum", "adamw"] = "adamw"
    learning_rate: float = Field(default=0.003, gt=0)
    """At its peak. Kind ``momentum`` wants far more, about 0.2 with batch norm."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Nesterov's, for kind ``momentum``."""
    weight_decay: float = Field(default=0.02, ge=0)
    """AdamW's is decoupled from the gradient; kind ``momentum`` wants far less, about 1e-4."""
    warmup: float = Field(default=0.08, ge=0, lt=1)
    """The share of all steps in which the rate rises."""
    clip_norm: float = Field(default=5.0, gt=0)
    """Gradients longer than this, all of them taken as one vector, are shortened to it."""


class TrainConfig(_Section):
    """How long, and what is done on the way."""

    steps: int = Field(default=700, ge=1)
    batch_characters: int = Field(default=256, ge=8)
    """Of a step's batch, on all ranks together. One of short lines holds more of them, so that steps cost the same."""
    alignment: float = Field(default=0.8, ge=0, le=1)
    """The share of all steps in which rendered lines also teach where each character stands; see ``train``."""
    log_every: int = Field(default=10, ge=1)
    evaluate_every: int = Field(default=100, ge=1)
    evaluate_lines: int = Field(default=240, ge=1)
    """How many test lines the evaluations on the way look at; the one at the end takes all."""
    checkpoint_every: int = Field(default=100, ge=1)
    monitor_every: int = Field(default=50, ge=1)
    """How often the norm layers' distributions and statistics are sampled for the report."""
    timeout: float = Field(default=60, gt=0)
    """Seconds for which ranks that train together wait for each other; more than rank 0 takes to evaluate and to write
    a checkpoint, for which the others wait."""


class DataConfig(_Section):
    """What is read. Relative paths count from the folder in which the job is started."""

    words: Path | None = None
    """A word list, ``word frequency`` a line; without it the dictionary of the package jieba."""
    characters: int = Field(default=1150, ge=2)
    """The alphabet: this many most frequent characters of the words."""
    extra_characters: str = ""
    """Characters to know beside these, for labelled images that hold them."""
    fonts: tuple[Path, ...] | None = None
    """Font files to render with; without it NotoSansSC and NotoSerifSC. An empty list: render nothing."""
    unseen_font: Path | None = None
    """The font of the second test set; without it wqy-microhei."""
    labels: Path | None = None
    """Labelled line images to train on, ``path<TAB>text`` a line, paths from the list's own folder."""
    labels_share: float = Field(default=0.5, gt=0, le=1)
    """The share of all steps that train on ``labels``, where lines are rendered too."""
    test_labels: Path | None = None
    """Labelled line images to test on, in place of rendered lines of held-out words."""
    min_length: int = Field(default=2, ge=1)
    max_length: int = Field(default=8, ge=1, le=40)
    sizes: tuple[int, ...] = (21, 23, 25, 27)
    """Of the glyphs, in pixels of a line that is 32 high."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """The share of the words that training never shows."""
    test_lines: int = Field(default=2000, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length={self.min_length} is above max_length={self.max_length}")
        if not self.sizes or not all(8 <= size <= 32 for size in self.sizes):
            raise ValueError(f"sizes={list(self.sizes)} must be one or more numbers from 8 to 32")
        if self.fonts == () and (self.labels is None or self.test_labels is None):
            raise ValueError("fonts=[] renders nothing, so labels and test_labels must both be given")
        return self


class Config(_Section):
    """Everything that decides what the job does; the same configuration gives the same run."""

    seed: int = Field(default=20240601, ge=0)
    model: ModelConfig = ModelConfig()
    norm: NormConfig = NormConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, settings: Any) -> Any:
        # A section of which every line is commented out.
        return {key: {} if value is None else value for key, value in settings.items()}

    @model_validator(mode="after")
    def _groups_divide(self) -> Config:
        widths = (*self.model.channels, self.model.features)
        if self.norm.kind == "group_norm" and any(width % self.norm.groups for width in widths):
            raise ValueError(f"norm.groups={self.norm.groups} must divide every number of channels {list(widths)}")
        return self

    def batch_lines(self, longest: int) -> int:
        """How many lines of at most so many characters make a batch."""
        return max(2, self.train.batch_characters // longest)

    @property
    def smallest_batch(self) -> int:
        """Lines of a batch of the longest."""
        return self.batch_lines(self.data.max_length)

    def to_yaml(self) -> str:
        """The whole configuration, defaults included; :func:`load` reads it back."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a file, with ``KEY=VALUE`` overrides such as ``"train.steps=400"`` over it.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or a key or value is not one that Config has.
    """
    settings = {} if path is None else _read(Path(path))
    for override in overrides:
        _override(settings, override)
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(explain(error, settings, Config)) from error


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not 'key: value' pairs; see the default config")
    return content


def _override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{override!r} sets nothing; write it as KEY=VALUE, for instance train.steps=400")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{key}={text[:60]}: the value is not YAML ({problem}); quote it") from error
    *sections, name = key.split(".")
    for depth, section in enumerate(sections):
        inner = settings.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{key}: {'.'.join(sections[: depth + 1])} is a value, not a section; drop the rest of the key"
            )
        settings = inner
    if isinstance(settings, LinedDict):
        settings.override(name, value)
    else:
        settings[name] = value
