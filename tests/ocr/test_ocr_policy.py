"""The recipe takes its norms from a policy: from YAML to training, through a stop and a resumption."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import flatwater.paddle as fw
from flatwater.errors import ConfigError
from flatwater.recipes.ocr import config, train
from flatwater.recipes.ocr.data import DataSource
from flatwater.recipes.ocr.model import Recognizer, build
from flatwater.recipes.ocr.ranks import World

SETTINGS = """
model: {channels: [8, 8, 8, 8], features: 16}
train: {steps: 6, batch_characters: 12, log_every: 2, evaluate_every: 6, evaluate_lines: 4, checkpoint_every: 3}
data: {characters: 40, max_length: 4, sizes: [23], test_lines: 8}
norm:
  momentum: 0.8
  rules:
  - match: [backbone.2.*, neck.*]
    norm_type: gn
    groups: 4
    norm_decay: 0.
  - match: backbone.0.*
    freeze: {what: both, from_step: 4}
"""


def settings_of(folder: Path, text: str = SETTINGS) -> config.Config:
    file = folder / "ocr.yaml"
    file.write_text(text, encoding="utf-8")
    return config.load(file)


def run(settings: config.Config, folder: Path, **kwargs: bool) -> train.TrainResult:
    return train.train(settings, folder, DataSource(settings), console=Console(file=io.StringIO()), **kwargs)


def weights(model: Recognizer) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def test_it_trains_with_group_norm_where_the_rules_say_so(tmp_path: Path) -> None:
    result = run(settings_of(tmp_path), tmp_path)
    assert result.completed
    assert np.isfinite([point.loss for point in result.history.train]).all()
    model = result.model
    kinds = [type(model.backbone[0].bn), type(model.backbone[2].bn), type(model.neck.bn)]
    assert kinds == [fw.BatchNorm2D, fw.GroupNorm, fw.GroupNorm]
    assert model.neck.bn._num_groups == 4
    assert model.neck.bn._act == "relu"
    assert not np.array_equal(model.neck.bn.weight.numpy(), np.ones(16))
    assert model.backbone[1].bn._momentum == 0.8
    assert fw.frozen_report(model).held == [
        f"backbone.0.bn.{name}" for name in ("weight", "bias", "_mean", "_variance")
    ]


@pytest.mark.parametrize("checkpoint", [3, 5])  # before and after the freezing
def test_a_stopped_run_freezes_as_one_that_never_stopped(tmp_path: Path, checkpoint: int) -> None:
    settings = settings_of(tmp_path, SETTINGS.replace("checkpoint_every: 3", f"checkpoint_every: {checkpoint}"))
    whole = run(settings, tmp_path / "whole")

    class StopError(Exception):
        pass

    def stop(step: int, _: Recognizer) -> contextlib.AbstractContextManager[None]:
        if step == 6:
            raise StopError
        return contextlib.nullcontext()

    with pytest.raises(StopError):
        train.train(
            settings, tmp_path / "parts", DataSource(settings), console=Console(file=io.StringIO()), on_step=stop
        )
    parts = run(settings, tmp_path / "parts", resume=True)
    one, other = weights(whole.model), weights(parts.model)
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_weight_decay_reaches_only_what_the_policy_leaves_it(tmp_path: Path) -> None:
    text = SETTINGS.replace("train: {", "optimizer: {weight_decay: 0.5}\ntrain: {")
    settings = settings_of(tmp_path, text)
    training = train._Training(settings, tmp_path, DataSource(settings), World(), resume=False, on_step=None)
    decays = training.optimizer._apply_decay_param_fun
    assert not decays(training.model.neck.bn.weight.name)
    assert decays(training.model.backbone[1].bn.weight.name)
    assert decays(training.model.head.weight.name)


def test_the_configuration_is_written_with_its_rules(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    again = settings_of(tmp_path, settings.to_yaml())
    assert again == settings
    assert "norm: group_norm" in settings.to_yaml()


def test_auto_looks_at_the_recipes_own_batch() -> None:
    rules = "norm.rules=[{norm: auto}]"
    small = config.load(None, [rules, "train.batch_characters=40", "data.max_length=4"])
    model, policy = build(small, 11)
    assert isinstance(model.neck.bn, fw.GroupNorm)
    assert "10 samples per device" in str(policy)
    model, _ = build(config.load(None, [rules, "train.batch_characters=256", "data.max_length=8"]), 11)
    assert isinstance(model.neck.bn, fw.BatchNorm2D)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("groups: 4", "gruops: 4", r"line 10: unknown key norm\.rules\.0\.gruops; did you mean groups"),
        ("norm_type: gn", "norm_type: gm", r"line 9: norm\.rules\.0\.norm_type='gm': input should be"),
        ("from_step: 4", "from_epoch: 4", r"line 13: norm: from_epoch=4 never comes"),
        (
            "freeze: {what: both, from_step: 4}",
            "momentum_schedule: {at: {0: 0.5}, by: epoch}",
            r"line 13: norm: by=epoch never comes",
        ),
        ("momentum: 0.8", "kind: none", "line 7: norm: rules contradict kind=none"),
        ("momentum: 0.8", "momentum: 0.8\n  momentum: 0.9", "line 7: 'momentum' is given in line 6 already"),
        ("steps: 6", "setps: 6", r"line 3: unknown key train\.setps; did you mean train\.steps"),
    ],
)
def test_errors_in_the_file_name_the_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        settings_of(tmp_path, SETTINGS.replace(old, new))
    assert str(caught.value).startswith(str(tmp_path / "ocr.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("neck.*", "nekc.*", r"ocr\.yaml, line 8: match='nekc\.\*' matches none of the 5 norm layers"),
        ("groups: 4", "groups: 3", r"ocr\.yaml, line 9: .*groups=3 does not divide"),
    ],
)
def test_errors_of_the_model_name_the_line_too(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(settings_of(tmp_path, SETTINGS.replace(old, new)), 11)


def test_an_override_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    file = tmp_path / "ocr.yaml"
    file.write_text(SETTINGS, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^norm\.momentum=3: "):
        config.load(file, ["norm.momentum=3"])
