"""Freezing: statistics stand still in training, γ and β get no gradient, thaw brings everything back."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from networks import evaluate, example, randomize
from paddle import nn

import flatwater.paddle as fw
from flatwater.errors import StatisticsError, SurgeryError
from flatwater.paddle.freeze import freeze, thaw

KINDS = {
    "BatchNorm": nn.BatchNorm,
    "BatchNorm2D": nn.BatchNorm2D,
    "ours": fw.BatchNorm2D,
    "our BatchNorm": fw.BatchNorm,
}


def network(kind: type[nn.Layer] = fw.BatchNorm2D) -> nn.Layer:
    return randomize(nn.Sequential(nn.Conv2D(3, 4, 1), kind(4), nn.Conv2D(4, 4, 1), kind(4)))


# Paddle's BatchNorm2D says in every training step that it tracks statistics, which it then does not.
@pytest.mark.filterwarnings("ignore:When training, we now always track:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_layer_trains_as_it_evaluates(kind: str) -> None:
    model = network(KINDS[kind])
    x = example(4, 3, 5, 5)
    expected, mean = evaluate(model, x), model[1]._mean.numpy().copy()

    assert freeze(model).changed == ["1", "3"]

    assert model.training
    y = model(x)
    # float32: one normalization with the same statistics, by two kernels
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert np.array_equal(model[1]._mean.numpy(), mean)
    assert model[1].weight.grad is None
    assert model[0].weight.grad is not None


def test_thaw_restores_what_was_and_freezing_twice_is_freezing_once() -> None:
    model = network()
    model[1].weight.stop_gradient = True
    model[3]._use_global_stats = False

    freeze(model, affine=False)
    assert model[1].bias.stop_gradient is False
    report = freeze(model)
    assert report.changed == ["1", "3"]
    assert freeze(model).left == {"1": "is frozen already", "3": "is frozen already"}

    assert thaw(model).changed == ["1", "3"]
    assert model[1]._use_global_stats is None
    assert model[3]._use_global_stats is False
    assert model[1].weight.stop_gradient is True
    assert model[1].bias.stop_gradient is False
    assert model[3].weight.stop_gradient is False
    assert thaw(model).left == {"1": "is not frozen", "3": "is not frozen"}


def test_a_pattern_selects_by_path() -> None:
    model = nn.LayerDict({"backbone": network(), "head": network()})
    assert freeze(model, pattern="backbone.*").changed == ["backbone.1", "backbone.3"]
    assert not model["head"][1]._use_global_stats
    assert thaw(model, pattern="*.3").changed == ["backbone.3"]
    assert model["backbone"][1]._use_global_stats


def test_layers_that_cannot_be_frozen_are_left_with_a_reason() -> None:
    model = nn.Sequential(nn.BatchNorm2D(4), nn.SyncBatchNorm(4), nn.GroupNorm(2, 4))
    report = freeze(model)
    assert report.changed == ["0"]
    assert "ignores use_global_stats" in report.left["1"]
    assert "no running statistics" in report.left["2"]
    assert str(report).startswith("1 norm layers changed, 2 left")
    assert freeze(model, statistics=False).changed == ["1"]


@pytest.mark.parametrize(("name", "value"), [("_mean", np.nan), ("_variance", np.inf), ("_variance", -1.0)])
def test_bad_statistics_are_not_frozen(name: str, value: float) -> None:
    model = network()
    getattr(model[3], name)[2] = value
    with pytest.raises(StatisticsError, match=r"norm layer '3' .* channel 2"):
        freeze(model)
    assert not any(model[index]._use_global_stats or model[index].weight.stop_gradient for index in (1, 3))
    assert freeze(model, pattern="1").changed == ["1"]
    assert freeze(model, statistics=False).changed == ["3"]


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (nn.Linear(2, 2), {}, "has no batch norm layer"),
        (network(), {"pattern": "head.*"}, "no batch norm layer whose path matches 'head.*'"),
        (network(), {"affine": False, "statistics": False}, "asks for nothing"),
        (paddle.Model(network()), {}, "its network is model.network"),
    ],
)
def test_bad_arguments(model: nn.Layer, settings: dict[str, object], message: str) -> None:
    with pytest.raises(SurgeryError, match=message.replace("*", r"\*")) as caught:
        freeze(model, **settings)
    assert "\n" not in str(caught.value)
