"""Recalibration: the statistics of the whole data set, exactly, whatever its batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import randomize, state_of
from paddle import nn
from paddle.distributed.fleet.utils import recompute
from recalibration_data import (
    COMPUTED,
    STORED,
    assert_statistics,
    data,
    normalized,
    same_bits,
    statistics_of,
    two_layers,
)

import flatwater.paddle as fw
from flatwater import reference
from flatwater.errors import SurgeryError
from flatwater.paddle.surgery.population import _moments_by_operators
from flatwater.surgery.recalibration import Pool

# Paddle's BatchNorm2D says in every training step that it tracks statistics.
pytestmark = pytest.mark.filterwarnings("ignore:When training, we now always track:UserWarning")

KINDS: dict[str, tuple[Callable[[], nn.Layer], tuple[int, ...], int]] = {
    "nn.BatchNorm": (lambda: nn.BatchNorm(3), (3, 4, 5), 1),
    "nn.BatchNorm1D": (lambda: nn.BatchNorm1D(3), (3,), 1),
    "nn.BatchNorm2D": (lambda: nn.BatchNorm2D(3), (3, 4, 5), 1),
    "nn.BatchNorm2D, channels last": (lambda: nn.BatchNorm2D(3, data_format="NHWC"), (4, 5, 3), -1),
    "nn.BatchNorm3D": (lambda: nn.BatchNorm3D(3), (3, 2, 4, 5), 1),
    "nn.SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), (3, 4, 5), 1),
    "fw.BatchNorm": (lambda: fw.BatchNorm(3, data_layout="NHWC"), (4, 5, 3), -1),
    "fw.BatchNorm1D": (lambda: fw.BatchNorm1D(3, data_format="NLC"), (7, 3), -1),
    "fw.BatchNorm2D": (lambda: fw.BatchNorm2D(3, act="relu"), (3, 4, 5), 1),
    "fw.SyncBatchNorm": (lambda: fw.SyncBatchNorm(3), (3, 4, 5), 1),
}


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gets_the_statistics_of_the_concatenated_data(kind: str, in_order: bool) -> None:
    make, shape, axis = KINDS[kind]
    model = randomize(nn.Sequential(make()))
    kept = type(model[0]), model[0]._momentum, list(model[0].__dict__)
    batches = data(*shape)
    report = fw.recalibrate(model, batches, in_order=in_order)
    assert_statistics(model[0], batches, STORED, axis)
    assert [change.path for change in report.layers] == ["0"]
    assert report.layers[0].calls == report.batches == 3
    assert report.layers[0].count == 19 * int(np.prod(shape)) // 3
    assert (type(model[0]), model[0]._momentum) == kept[:2]


def test_far_from_zero_nothing_is_lost() -> None:
    model = nn.Sequential(nn.BatchNorm1D(3))
    batches = [1e4 + batch for batch in data(3, sizes=(100, 1000, 7), offset=0.0)]
    fw.recalibrate(model, batches)
    assert_statistics(model[0], batches, STORED)


def test_by_default_a_layer_reads_what_training_gives_it() -> None:
    model, batches = two_layers(), data(3)
    second = [np.maximum(normalized(model[0], batch), 0) for batch in batches]
    report = fw.recalibrate(model, batches)
    assert report.passes == 1
    assert_statistics(model[0], batches, STORED)
    assert_statistics(model[3], second, COMPUTED)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("samples", [0, 5])
def test_other_devices_than_the_cpu_measure_by_operators(axis: int, samples: int) -> None:
    x = data(4, 6, sizes=(samples,))[0]
    mean, m2 = _moments_by_operators(paddle.to_tensor(x), axis)
    expected = reference.batch_statistics(x, axis=axis)
    # float64: one sum over 30 values
    np.testing.assert_allclose(mean, expected.mean, rtol=1e-14)
    np.testing.assert_allclose(m2, expected.variance * expected.count, rtol=1e-13)


def test_what_stands_between_layers_does_not_matter() -> None:
    class Wrapped(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm1D(3), nn.BatchNorm1D(3)

        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            return recompute(self.second, recompute(self.first, x))

    model, plain = randomize(Wrapped()), randomize(nn.Sequential(nn.BatchNorm1D(3), nn.BatchNorm1D(3)))
    for options in ({}, {"in_order": True}):
        fw.recalibrate(model, data(3), **options)
        fw.recalibrate(plain, data(3), **options)
        assert [v.tobytes() for v in state_of(model).values()] == [v.tobytes() for v in state_of(plain).values()]


def test_float64_models_get_float64_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1D(3), fw.BatchNorm1D(3)).to(dtype="float64")
    batches = [batch.astype("float64") for batch in data(3)]
    fw.recalibrate(model, batches, in_order=True)
    assert_statistics(model[0], batches, {"rtol": 1e-14, "atol": 1e-14})


def test_a_layer_that_runs_twice_pools_both() -> None:
    class Twice(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1D(3)

        def forward(self, x: paddle.Tensor, y: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
            return self.norm(x), self.norm(input=y)

    model, batches = Twice(), data(3)
    report = fw.recalibrate(model, [(batch, 2 * batch[:2]) for batch in batches], in_order=True)
    assert report.layers[0].calls == 6
    assert_statistics(model.norm, [part for batch in batches for part in (batch, 2 * batch[:2])], STORED)


def test_a_pattern_leaves_the_others_in_eval() -> None:
    model, batches = two_layers(), data(3)
    own = reference.Statistics(*statistics_of(model[0]), count=1)
    before = state_of(model)
    fw.recalibrate(model, batches, pattern="3")
    assert_statistics(model[3], [np.maximum(normalized(model[0], batch, own), 0) for batch in batches], COMPUTED)
    assert same_bits(*({name: state[name] for name in before if name[0] == "0"} for state in (before, state_of(model))))


def test_frozen_layers_are_left() -> None:
    model = two_layers()
    fw.freeze(model, pattern="0")
    report = fw.recalibrate(model, data(3))
    assert report.left == {"0": "its statistics are frozen"}
    assert fw.frozen_report(model).ok
    fw.freeze(model)
    with pytest.raises(SurgeryError, match="all batch norm layers are frozen, among them '0'; thaw"):
        fw.recalibrate(model, data(3))


def _dict_loader() -> Iterator[dict[str, np.ndarray]]:
    for batch in data(3):
        yield {"input": batch}


LOADERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "arrays": (lambda: data(3), {}),
    "tensors": (lambda: [paddle.to_tensor(batch) for batch in data(3)], {}),
    "lists of one": (lambda: [[batch] for batch in data(3)], {}),
    "with labels": (
        lambda: [(paddle.to_tensor(batch), paddle.zeros([len(batch)])) for batch in data(3)],
        {"forward": lambda model, batch: model(batch[0])},
    ),
    "dicts, read once": (_dict_loader, {}),
    "Paddle's DataLoader": (
        lambda: paddle.io.DataLoader(
            paddle.io.TensorDataset([np.concatenate(data(3))]), batch_size=8, shuffle=True, drop_last=False
        ),
        {"in_order": True},
    ),
}


@pytest.mark.parametrize("form", LOADERS)
def test_forms_of_loaders(form: str) -> None:
    make, options = LOADERS[form]
    model = nn.Sequential(nn.BatchNorm1D(3))
    fw.recalibrate(model, make(), **options)
    assert_statistics(model[0], data(3), STORED)


def test_so_many_batches_and_no_more() -> None:
    model = nn.Sequential(nn.BatchNorm1D(3))
    assert fw.recalibrate(model, data(3), batches=2).batches == 2
    assert_statistics(model[0], data(3)[:2], STORED)


@pytest.mark.parametrize("in_order", [False, True])
def test_statistics_that_were_nan_are_made_whole(in_order: bool) -> None:
    model, sound = two_layers(), two_layers()
    model[0]._mean[1] = float("nan")
    model[3]._variance.set_value(np.full(3, np.nan, "float32"))
    report = fw.recalibrate(model, data(3), in_order=in_order)
    fw.recalibrate(sound, data(3), in_order=in_order)
    assert same_bits(state_of(model), state_of(sound))
    as_dict = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert as_dict["layers"][0]["mean_shift"] == [None, None]
    assert as_dict["layers"][1]["variance_ratio"] == [None, None]


def test_the_report_measures_by_what_was_before(capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.BatchNorm1D(2, epsilon=1e-5))
    model[0]._mean.set_value(np.array([1.0, 0.0], "float32"))
    model[0]._variance.set_value(np.array([4.0, 1.0], "float32"))
    batch = np.array([[6.0, -1.0], [8.0, 1.0]], "float32")  # mean 7, 0; variance 1, 1
    report = fw.recalibrate(model, [batch])
    change = report.layers[0]
    assert change.mean_shift == pytest.approx((3.0, 1.5), rel=1e-5)  # ε beside a variance of 4
    assert change.variance_ratio == pytest.approx((0.25, 1.0), rel=1e-5)
    assert report.as_dict()["layers"][0]["path"] == "0"
    table = str(report)
    assert table.splitlines()[0].strip() == "1 layers recalibrated; batches per pass: 1, passes: 1"
    assert all(number in table for number in (" 3 ", " 1.5 ", " 0.25 "))
    assert capfd.readouterr() == ("", "")  # no bar where there is no terminal


def test_a_terminal_shows_how_far_it_is(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes everything for a terminal
    fw.recalibrate(two_layers(), data(3), in_order=True)
    out, err = capfd.readouterr()
    assert not out
    assert "recalibrate, pass 2 of 2" in err
    assert "3/3" in err
    fw.recalibrate(two_layers(), data(3), progress=False)
    assert capfd.readouterr() == ("", "")


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8), offset=st.floats(-1e6, 1e6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_pooling_parts_is_measuring_the_whole(sizes: list[int], offset: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    parts = [generator.normal(offset, 1.0, (size, 2)) for size in sizes]
    pool = Pool.empty(2)
    for part in parts:
        found = reference.batch_statistics(part)
        pool.add(found.count, found.mean, found.variance * found.count)
    whole = reference.batch_statistics(np.concatenate(parts))
    assert (pool.count, pool.calls) == (whole.count, len(parts))
    # float64: the means of parts are rounded to 1e-16 of 1e6, and enter the variance as differences of about 1.
    np.testing.assert_allclose(pool.mean, whole.mean, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(pool.variance, whole.variance, rtol=1e-9, atol=1e-12)
