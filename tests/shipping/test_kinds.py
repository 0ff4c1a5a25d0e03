"""Norms of one kind made another: the same parameters in a layer that computes what a new one would, and back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from networks import evaluate, example, randomize, state_of
from paddle import nn

import flatwater.paddle as fw
from flatwater.errors import InputError, StatisticsError, SurgeryError
from flatwater.paddle.surgery.recast import InstanceNorm, kind_of

CHANNELS = 6
SHAPES = {"1d": (4, CHANNELS, 7), "2d": (4, CHANNELS, 5, 3), "3d": (2, CHANNELS, 3, 4, 5)}
ORIGINS: dict[str, tuple[Any, str]] = {
    "stock BatchNorm": (lambda: nn.BatchNorm(CHANNELS, act="relu"), "2d"),
    "stock BatchNorm1D": (lambda: nn.BatchNorm1D(CHANNELS), "1d"),
    "stock BatchNorm2D": (lambda: nn.BatchNorm2D(CHANNELS), "2d"),
    "stock BatchNorm3D": (lambda: nn.BatchNorm3D(CHANNELS), "3d"),
    "stock SyncBatchNorm": (lambda: nn.SyncBatchNorm(CHANNELS), "2d"),
    "stock GroupNorm": (lambda: nn.GroupNorm(2, CHANNELS), "2d"),
    "stock InstanceNorm1D": (lambda: nn.InstanceNorm1D(CHANNELS), "1d"),
    "stock InstanceNorm2D": (lambda: nn.InstanceNorm2D(CHANNELS), "2d"),
    "our BatchNorm2D": (lambda: fw.BatchNorm2D(CHANNELS, act="hardswish"), "2d"),
    "our SyncBatchNorm": (lambda: fw.SyncBatchNorm(CHANNELS, act="relu"), "2d"),
    "our GroupNorm": (lambda: fw.GroupNorm(3, CHANNELS, act="relu"), "2d"),
    "our InstanceNorm3D": (lambda: fw.InstanceNorm3D(CHANNELS), "3d"),
    "γ only": (lambda: nn.BatchNorm2D(CHANNELS, bias_attr=False), "2d"),
    "no affine": (lambda: nn.BatchNorm2D(CHANNELS, weight_attr=False, bias_attr=False), "2d"),
}
TARGETS = ("batch_norm", "sync_batch_norm", "group_norm", "instance_norm")


def layer_of(origin: str) -> Any:
    layer = ORIGINS[origin][0]()
    randomize(layer)
    generator = np.random.default_rng(5)
    for parameter in layer.parameters():
        if not parameter.stop_gradient:
            parameter.set_value(generator.uniform(0.5, 1.5, parameter.shape).astype("float32"))
    return layer


def fresh(target: str, layer: Any) -> Any:
    """A new layer of that kind with the values of ``layer``."""
    act = getattr(layer, "_act", None)
    built = {
        "batch_norm": lambda: fw.BatchNorm(CHANNELS, act),
        "sync_batch_norm": lambda: fw.SyncBatchNorm(CHANNELS, act=act),
        "group_norm": lambda: fw.GroupNorm(2, CHANNELS, act=act),
        "instance_norm": lambda: fw.GroupNorm(CHANNELS, CHANNELS, act=act),
    }[target]()
    for ours, theirs in ((built.weight, affine(layer)[0]), (built.bias, affine(layer)[1])):
        if theirs is not None:
            ours.set_value(theirs)
    for name in ("_mean", "_variance"):
        if hasattr(built, name) and hasattr(layer, name):
            getattr(built, name).set_value(getattr(layer, name))
    return built


def affine(layer: Any) -> tuple[Any, Any]:
    return (layer.scale if kind_of(layer) == "instance_norm" else layer.weight), layer.bias


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_any_kind_becomes_any_other_and_comes_back(origin: str, target: str) -> None:
    layer = layer_of(origin)
    model = nn.Sequential(layer)
    x = example(*SHAPES[ORIGINS[origin][1]])
    kind, attributes, before = type(layer), dict(vars(layer)), state_of(model)
    parameters = dict(layer._parameters)
    weight, bias = affine(layer)
    expected = evaluate(fresh(target, layer), x)
    stays = kind_of(layer) == target and target != "group_norm"
    same_groups = kind_of(layer) == "group_norm" == target and layer._num_groups == 2

    report = fw.convert(model, target, groups=2 if target == "group_norm" else None)

    assert report.changed == ([] if stays or same_groups else ["0"])
    assert model[0] is layer
    assert kind_of(layer) == target
    assert affine(layer)[0] is weight
    assert affine(layer)[1] is bias
    if not (stays or same_groups):
        # float32: one normalization by two kernels
        np.testing.assert_allclose(evaluate(model, x), expected, rtol=1e-5, atol=1e-5)
        if kind_of(layer) != "sync_batch_norm":
            layer(x).sum().backward()  # it trains, with the kernels
        str(layer)
    for name in ("_mean", "_variance"):
        if name in parameters and name in layer._parameters and not (stays or same_groups):
            layer._parameters[name].set_value(before[f"0.{name}"])  # training has moved them

    if target not in ("batch_norm", "sync_batch_norm") and "_mean" in parameters:
        assert "kept aside" in report.notes["0"]
        assert "0._mean" not in model.state_dict()

    fw.revert(model)
    fused = kind is not nn.BatchNorm and attributes.get("_act")
    assert type(layer) is (kind if fused else getattr(nn, kind.__name__))
    assert list(layer._parameters) == list(parameters)
    assert all(layer._parameters[name] is parameter for name, parameter in parameters.items())
    after = state_of(model)
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    changed = {name for name in {*attributes, *vars(layer)} if vars(layer).get(name) is not attributes.get(name)}
    assert changed <= {"_accepted"}


@pytest.mark.parametrize("seed", range(6))
def test_a_chain_of_kinds_loses_nothing(seed: int) -> None:
    model = randomize(nn.Sequential(nn.BatchNorm2D(CHANNELS)))
    before, names = state_of(model), list(vars(model[0]))
    generator = np.random.default_rng(seed)
    for target in generator.choice(TARGETS, 6):
        fw.convert(model, str(target))
        assert kind_of(model[0]) == target
    fw.revert(model)
    assert type(model[0]) is nn.BatchNorm2D
    assert list(vars(model[0])) == names or set(vars(model[0])) == set(names)
    after = state_of(model)
    assert all(np.array_equal(after[name], value) for name, value in before.items())


def test_an_optimizer_made_before_goes_on_working() -> None:
    model = nn.Sequential(nn.Conv2D(3, 8, 3), nn.BatchNorm2D(8))
    optimizer = paddle.optimizer.Momentum(0.1, parameters=model.parameters())
    fw.convert(model, "instance_norm")
    before = model[1].scale.numpy().copy()
    (model(example(2, 3, 6, 6)) * example(2, 8, 4, 4)).sum().backward()
    optimizer.step()
    assert not np.array_equal(model[1].scale.numpy(), before)
    moved = model[1].scale.numpy().copy()
    fw.revert(model)
    assert np.array_equal(model[1].weight.numpy(), moved)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_have_the_statistics_aside_too(duplicate: Any) -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, CHANNELS, 1), nn.BatchNorm2D(CHANNELS)))
    before = model[1]._mean.numpy().copy()
    fw.convert(model, "group_norm")
    twin = duplicate(model)
    fw.revert(twin)
    assert type(twin[1]) is nn.BatchNorm2D
    assert np.array_equal(twin[1]._mean.numpy(), before)
    assert type(model[1]) is fw.GroupNorm


def test_a_network_trains_with_another_kind_and_ships() -> None:
    model = paddle.vision.models.resnet18(num_classes=4)
    x = example(2, 3, 32, 32)
    report = fw.convert(model, "group_norm", pattern="layer*")
    assert len(report.changed) == 19
    assert "19 norm layers changed" in str(report)
    assert "layer1.0.bn1: GroupNorm has no place for moving statistics" in str(report)
    assert model.layer1[0].bn1._num_groups == 32
    model.train()
    with pytest.warns(UserWarning, match="track global mean"):
        model(x).sum().backward()
    assert model.layer4[1].bn2.weight.grad is not None


@pytest.mark.parametrize("target", [None, *TARGETS[1:], "frozen"])
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_25", "densenet121"])
def test_networks_come_back_bit_for_bit(name: str, target: Any) -> None:
    model = randomize(getattr(paddle.vision.models, name)(num_classes=4))
    before, classes = state_of(model), [type(layer) for layer in model.sublayers()]
    report = fw.convert(model, target)
    assert report.changed
    assert not report.left
    assert np.isfinite(evaluate(model, example(1, 3, 64, 64))).all()
    fw.revert(model)
    after = state_of(model)
    assert list(after) == list(before)
    assert all(after[key].tobytes() == value.tobytes() for key, value in before.items())
    assert [type(layer) for layer in model.sublayers()] == classes


def test_frozen_is_a_kind_too() -> None:
    model = randomize(nn.Sequential(nn.BatchNorm2D(3), nn.GroupNorm(3, 3), fw.BatchNorm2D(3)))
    fw.convert(model, "group_norm", pattern="2")
    fw.freeze(model, pattern="1")
    report = fw.convert(model, "frozen")
    assert report.changed == ["0", "2"]
    assert "no moving statistics to freeze" in report.left["1"]
    assert fw.frozen_report(model).ok
    assert fw.convert(model, "group_norm").left["0"] == "this BatchNorm2D is frozen; thaw it first"

    fw.revert(model)
    assert not model[0].weight.stop_gradient
    assert model[1].weight.stop_gradient  # which freeze() did, not convert()
    assert type(model[2]) is nn.BatchNorm2D


def test_what_is_frozen_keeps_the_kind_that_frozen_report_knows() -> None:
    model = nn.Sequential(nn.BatchNorm2D(4), nn.SyncBatchNorm(4))
    fw.convert(model, "group_norm", pattern="0")
    fw.freeze(model)
    report = fw.revert(model)
    assert set(report.left) == {"0", "1"}
    assert all("thaw it first" in reason for reason in report.left.values())
    fw.thaw(model)
    assert fw.revert(model).changed == ["0"]
    assert [type(layer) for layer in model] == [nn.BatchNorm2D, nn.SyncBatchNorm]


class Mine(nn.BatchNorm2D):
    pass


@pytest.mark.parametrize(
    ("layer", "target", "groups", "reason"),
    [
        (lambda: Mine(4), "group_norm", None, "subclass, which may do more"),
        (lambda: nn.LayerNorm(4), "group_norm", None, "normalizes over features"),
        (lambda: nn.BatchNorm(4, act="sigmoid"), "group_norm", None, "'sigmoid' is not one that is fused"),
        (lambda: nn.BatchNorm(4, act="sigmoid"), None, None, "'sigmoid' is not one that is fused"),
        (lambda: nn.BatchNorm2D(4), "group_norm", 3, "groups=3 does not divide its 4 channels"),
        (lambda: nn.BatchNorm2D(4, data_format="NHWC"), "instance_norm", None, "channels are last"),
        (lambda: nn.BatchNorm(4, trainable_statistics=True), "sync_batch_norm", None, "trainable_statistics"),
        (lambda: nn.GroupNorm(2, 4), "group_norm", 2, "is group_norm already"),
    ],
)
def test_what_cannot_be_converted_is_left_as_it_was(layer: Any, target: Any, groups: Any, reason: str) -> None:
    model = nn.Sequential(layer())
    kind, attributes = type(model[0]), dict(vars(model[0]))
    report = fw.convert(model, target, groups=groups)
    assert not report.changed
    assert reason in report.left["0"]
    assert type(model[0]) is kind
    assert vars(model[0]) == attributes


def test_statistics_aside_follow_the_model_to_another_dtype() -> None:
    model = randomize(nn.Sequential(nn.BatchNorm2D(4)))
    mean = model[0]._mean
    before = mean.numpy().astype(np.float64)
    fw.convert(model, "group_norm")
    model.to(dtype="float64")
    fw.revert(model)
    assert model[0]._mean is mean
    assert np.array_equal(mean.numpy(), before)
    model.eval()
    assert model(example(2, 4, 3, 3, dtype="float64")).dtype == paddle.float64


@pytest.mark.parametrize("target", ["group_norm", "instance_norm"])
def test_what_was_converted_is_exported(tmp_path: Path, target: Any) -> None:
    model = nn.Sequential(nn.Conv2D(3, 4, 3), nn.BatchNorm(4, act="relu"), nn.Conv2D(4, 2, 1))
    fw.convert(model, target)
    x = example(2, 3, 6, 6)
    expected = evaluate(model, x)
    model.eval()
    paddle.jit.save(model, str(tmp_path / "model"), input_spec=[paddle.static.InputSpec([None, 3, None, None])])
    found = paddle.jit.load(str(tmp_path / "model"))(x).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # float32, added in another order


def test_channels_last_stay_last() -> None:
    model = randomize(nn.Sequential(nn.BatchNorm2D(4, data_format="NHWC")))
    x = example(2, 5, 3, 4)
    fw.convert(model, "group_norm", groups=2)
    first = randomize(nn.Sequential(nn.BatchNorm2D(4)))
    fw.convert(first, "group_norm", groups=2)
    np.testing.assert_allclose(  # float32, two layouts
        evaluate(model, x), evaluate(first, x.transpose([0, 3, 1, 2])).transpose([0, 2, 3, 1]), rtol=1e-5, atol=1e-5
    )


def test_a_norm_of_any_rank_becomes_an_instance_norm_of_any_rank() -> None:
    layer = nn.Sequential(nn.BatchNorm(4))
    fw.convert(layer, "instance_norm")
    assert type(layer[0]) is InstanceNorm
    for shape in ((2, 4, 5), (2, 4, 5, 3), (2, 4, 3, 2, 2)):
        assert layer(example(*shape)).shape == list(shape)


def test_bad_statistics_leave_the_whole_model_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm2D(2), nn.BatchNorm2D(2))
    model[1]._variance.set_value(np.array([np.nan, 1], "float32"))
    before, attributes = state_of(model), [dict(vars(layer)) for layer in model]
    with pytest.raises(StatisticsError, match="'1'"):
        fw.convert(model, "frozen")
    after = state_of(model)
    assert all(np.array_equal(after[name], value, equal_nan=True) for name, value in before.items())
    assert [vars(layer) for layer in model] == attributes
    assert not model[0].weight.stop_gradient


def test_arguments_that_make_no_sense() -> None:
    model = nn.Sequential(nn.BatchNorm2D(2))
    with pytest.raises(InputError, match="to='layer_norm' is no kind"):
        fw.convert(model, "layer_norm")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="for group_norm only"):
        fw.convert(model, "batch_norm", groups=2)
    with pytest.raises(SurgeryError, match="no norm layer whose path matches 'head"):
        fw.convert(model, pattern="head.*")
