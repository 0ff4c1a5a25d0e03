"""Training goes on where it stopped, to the bit, and says in one line why where it cannot."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from flatwater.errors import CheckpointError, ConfigError, FlatwaterError
from flatwater.recipes.ocr import config, train
from flatwater.recipes.ocr.data import DataSource
from flatwater.recipes.ocr.model import Recognizer

SMALL = [
    "model={channels: [8, 8, 8, 8], features: 16}",
    "train={steps: 6, batch_characters: 12, log_every: 2, evaluate_every: 4, evaluate_lines: 4, checkpoint_every: 3}",
    "data={characters: 40, max_length: 4, sizes: [23], test_lines: 8}",
]


@pytest.fixture(scope="module")
def data() -> DataSource:
    return DataSource(small())


def small(*overrides: str) -> config.Config:
    return config.load(None, [*SMALL, *overrides])


class Stop:
    """Sends this process Ctrl-C while it takes a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    @contextlib.contextmanager
    def __call__(self, step: int, _model: Recognizer) -> Iterator[None]:
        yield
        if step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


def quiet() -> Console:
    return Console(file=io.StringIO())


def weights(result: train.TrainResult) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in result.model.state_dict().items()}


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resuming_changes_nothing(tmp_path: Path, data: DataSource, kind: str, stop: int) -> None:
    settings = small(f"optimizer.kind={kind}")
    whole = train.train(settings, tmp_path / "whole", data, console=quiet())
    before = signal.getsignal(signal.SIGINT)
    first = train.train(settings, tmp_path / "parts", data, console=quiet(), on_step=Stop(stop))
    assert not first.completed
    assert signal.getsignal(signal.SIGINT) is before
    second = train.train(settings, tmp_path / "parts", data, resume=True, console=quiet())

    assert whole.completed
    assert second.completed
    assert [point.model_dump(exclude={"lines_per_second"}) for point in whole.history.train] == [
        point.model_dump(exclude={"lines_per_second"}) for point in second.history.train
    ]
    assert whole.history.evaluations == second.history.evaluations
    assert [point.step for point in whole.history.train] == [2, 4, 6]
    parts = weights(second)
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(value, parts[name], err_msg=name)


def test_a_finished_run_resumes_to_itself(tmp_path: Path, data: DataSource) -> None:
    first = train.train(small(), tmp_path, data, console=quiet())
    again = train.train(small(), tmp_path, data, resume=True, console=quiet())
    assert again.completed
    assert again.history == first.history


def test_the_loss_falls(tmp_path: Path, data: DataSource) -> None:
    settings = small("train.steps=120", "train.log_every=40", "optimizer.learning_rate=0.01")
    losses = [point.loss for point in train.train(settings, tmp_path, data, console=quiet()).history.train]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("kind", ["batch_norm", "group_norm", "instance_norm", "none"])
def test_every_norm_trains(tmp_path: Path, data: DataSource, kind: str) -> None:
    settings = small(f"norm.kind={kind}", "train.steps=2", "optimizer.learning_rate=0.01")
    assert train.train(settings, tmp_path, data, console=quiet()).completed


def test_what_matters_may_not_change(tmp_path: Path, data: DataSource) -> None:
    train.train(small("train.steps=2"), tmp_path, data, console=quiet())
    with pytest.raises(ConfigError, match=r"norm\.momentum=0\.9, not 0\.5; resume with the same settings"):
        train.train(small("train.steps=2", "norm.momentum=0.5"), tmp_path, data, resume=True, console=quiet())
    train.train(small("train.steps=2", "train.log_every=1"), tmp_path, data, resume=True, console=quiet())


def test_a_loss_that_is_not_finite_is_named(tmp_path: Path, data: DataSource) -> None:
    settings = small("norm.kind=none", "optimizer={learning_rate: 1.0e+30, clip_norm: 1.0e+30, warmup: 0}")
    with pytest.raises(FlatwaterError, match=r"the loss became (nan|inf) at step \d; lower optimizer\.learning_rate"):
        train.train(settings, tmp_path, data, console=quiet())


def test_there_must_be_a_checkpoint(tmp_path: Path, data: DataSource) -> None:
    with pytest.raises(CheckpointError, match=r"last\.ckpt: there is no checkpoint"):
        train.train(small(), tmp_path, data, resume=True, console=quiet())


def test_a_damaged_checkpoint_is_no_start(tmp_path: Path, data: DataSource) -> None:
    train.train(small("train.steps=1"), tmp_path, data, console=quiet())
    path = tmp_path / train.CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"last\.ckpt: is damaged or cut off; .*train from the start") as caught:
        train.train(small("train.steps=1"), tmp_path, data, resume=True, console=quiet())
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, data: DataSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train(small("train.steps=3"), tmp_path, data, console=quiet())
    path = tmp_path / train.CHECKPOINT
    content = path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train.train(small("train.steps=3"), tmp_path, data, console=quiet())
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_progress_without_a_terminal_is_plain_lines(tmp_path: Path, data: DataSource) -> None:
    stream = io.StringIO()
    train.train(small(), tmp_path, data, console=Console(file=stream, width=60))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 2/6  loss ")
    assert lines[-1].startswith("step 6/6  loss ")
    assert "accuracy" in lines[-1]
    assert "\x1b" not in stream.getvalue()


def test_progress_on_a_terminal_is_live(tmp_path: Path, data: DataSource) -> None:
    stream = io.StringIO()
    train.train(small(), tmp_path, data, console=Console(file=stream, width=120, force_terminal=True))
    last = stream.getvalue().split("\r")[-1]
    assert "6/6" in last
    assert "loss" in last
    assert "accuracy" in last


def test_the_rate_rises_and_falls() -> None:
    settings = config.OptimizerConfig(learning_rate=0.2, warmup=0.1)
    rates = [train.learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.002, rel=0.05)
