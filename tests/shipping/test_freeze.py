"""Freezing: statistics stand still in training, γ and β get no gradient, thaw brings everything back."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import evaluate, example, randomize, state_of
from paddle import nn

import flatwater.paddle as fw
from flatwater.errors import StatisticsError, SurgeryError
from flatwater.paddle.surgery.freeze import freeze, frozen_report, thaw

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


def test_each_kind_is_frozen_as_far_as_it_can_be() -> None:
    model = nn.Sequential(
        nn.BatchNorm2D(4), nn.GroupNorm(2, 4), fw.InstanceNorm2D(4), nn.BatchNorm(4, bias_attr=False), nn.LayerNorm(4)
    )
    report = freeze(model)
    assert report.changed == ["0", "1", "2", "3", "4"]
    assert report.lacking == {
        "1": "GroupNorm has no running statistics",
        "2": "InstanceNorm2D has no running statistics",
        "3": "BatchNorm has no β",
        "4": "LayerNorm has no running statistics",
    }
    assert str(report).startswith("5 norm layers changed, 0 left\n  1: GroupNorm has no running statistics")
    trained = {name for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    assert not trained
    assert len(thaw(model).changed) == 5
    assert {name for name, parameter in model.named_parameters() if not parameter.stop_gradient} == {
        *("0.weight", "0.bias", "1.weight", "1.bias", "2.scale", "2.bias", "3.weight", "4.weight", "4.bias")
    }


def test_statistics_alone_leave_the_norms_that_have_none() -> None:
    model = nn.Sequential(nn.BatchNorm2D(4), nn.GroupNorm(2, 4))
    assert freeze(model, affine=False).left == {"1": "GroupNorm has no running statistics"}
    with pytest.raises(SurgeryError, match=r"no norm layer has what freeze.* was asked for; '1': GroupNorm has no run"):
        freeze(model, affine=False, pattern="1")


@pytest.mark.parametrize(("one", "other"), [("weight", "bias"), ("bias", "weight")])
def test_weight_and_bias_by_themselves(one: str, other: str) -> None:
    model = network()
    freeze(model, affine=False, statistics=False, **{one: True})
    assert getattr(model[1], one).stop_gradient
    assert not getattr(model[1], other).stop_gradient
    assert model[1]._use_global_stats is None
    assert frozen_report(model).held == [f"1.{one}", f"3.{one}"]


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, fw.SyncBatchNorm])
def test_synchronised_statistics_are_frozen_too(kind: type[nn.Layer]) -> None:
    model = network(kind)
    x, before, attributes = example(4, 3, 5, 5), state_of(model), set(vars(model[1]))
    plain = network(fw.BatchNorm2D)
    plain.set_state_dict(before)
    expected = evaluate(plain, x)
    freeze(model)
    # float32: one normalization with the same statistics, by two kernels
    np.testing.assert_allclose(model(x).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert all(np.array_equal(before[name], values) for name, values in state_of(model).items())
    assert frozen_report(model).ok
    thaw(model)
    assert type(model[1]) is kind
    assert model[1]._use_global_stats is None
    assert set(vars(model[1])) - {"_accepted"} == attributes - {"_accepted"}
    assert kind is fw.SyncBatchNorm or set(vars(model[1])) == attributes


def test_a_synchronised_norm_with_a_forward_of_its_own_is_left() -> None:
    class Own(nn.SyncBatchNorm):
        pass

    model = nn.Sequential(nn.BatchNorm2D(4), Own(4))
    report = freeze(model)
    assert report.changed == ["0"]
    assert "Own is a subclass of Paddle's SyncBatchNorm" in report.left["1"]
    assert freeze(model, statistics=False).changed == ["1"]


def test_what_the_user_froze_is_watched_and_stays_frozen() -> None:
    model = network()
    model[1]._use_global_stats = True
    model[1].weight.stop_gradient = model[1].bias.stop_gradient = True
    report = freeze(model)
    assert (report.changed, report.left) == (["3"], {"1": "is frozen already"})
    assert "1._mean" in frozen_report(model).held
    thaw(model)
    assert model[1]._use_global_stats is True
    assert model[1].weight.stop_gradient is model[1].bias.stop_gradient is True


def test_several_freezes_are_undone_each_by_its_pattern() -> None:
    model = network()
    freeze(model, statistics=False, pattern="1")
    freeze(model, affine=False, pattern="3")
    freeze(model, affine=False)
    thaw(model, pattern="3")
    assert model[3]._use_global_stats is None
    assert model[1]._use_global_stats is True
    assert frozen_report(model).held == ["1.weight", "1.bias", "1._mean", "1._variance"]
    thaw(model)
    with pytest.raises(SurgeryError, match="nothing in the Sequential was frozen"):
        frozen_report(model)


@given(
    flags=st.lists(st.booleans(), min_size=6, max_size=6),
    asked=st.lists(
        st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["0", "1", "2", "[01]", "*"])),
        max_size=6,
    ),
)
@settings(deadline=None, max_examples=40)
def test_whatever_was_frozen_in_whatever_order_is_thawed_exactly(
    flags: list[bool], asked: list[tuple[bool, bool, bool, str]]
) -> None:
    model = nn.Sequential(nn.SyncBatchNorm(2), fw.BatchNorm2D(2, use_global_stats=flags[0]), nn.BatchNorm(2))
    parameters = [parameter for layer in model for parameter in (layer.weight, layer.bias)]
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.stop_gradient = flag

    def settings_of() -> list[object]:
        return [
            [(type(layer), layer._use_global_stats, layer.training) for layer in model],
            [parameter.stop_gradient for parameter in parameters],
        ]

    before = settings_of()
    for weight, bias, statistics, pattern in asked:
        if weight or bias or statistics:
            freeze(model, weight=weight, bias=bias, statistics=statistics, pattern=pattern)
            assert frozen_report(model).ok
    thaw(model)
    assert settings_of() == before


def test_a_shared_parameter_is_free_when_the_last_of_its_layers_is() -> None:
    model = network()
    model[3].weight = model[1].weight
    freeze(model, pattern="1")
    freeze(model, pattern="3")
    thaw(model, pattern="1")
    assert model[1].weight.stop_gradient is True
    thaw(model, pattern="3")
    assert model[1].weight.stop_gradient is False


def test_a_shared_parameter_that_is_frozen_at_once_is_free_again() -> None:
    model = network()
    model[3].weight = model[1].weight
    freeze(model)
    thaw(model, pattern="1")
    assert model[1].weight.stop_gradient is True
    thaw(model)
    assert model[1].weight.stop_gradient is False


def test_the_report_says_what_moved_and_by_how_much() -> None:
    model = network()
    freeze(model)
    assert frozen_report(model).ok
    assert str(frozen_report(model)) == "8 of 8 frozen tensors held bit for bit; nothing moved"

    moved = model[1].weight.numpy()
    moved[2] += 0.5
    model[1].weight.set_value(moved)
    model[3]._mean[0] = float("nan")
    model[1]._use_global_stats = None
    assert freeze(model, pattern="1").changed == ["1"]  # which takes no new copies
    model[3].bias.stop_gradient = False
    model[1]._use_global_stats = None

    report = frozen_report(model)
    assert not report.ok
    assert report.moved["1.weight"] == (1, 4, pytest.approx(0.5, rel=1e-6))  # float32: the rounding of one sum
    assert report.moved["3._mean"] == (1, 4, np.inf)
    assert report.released["3.bias"] == "its stop_gradient is False"
    assert "by the batch again" in report.released["1._variance"]
    assert "moved     1.weight: 1 of 4 values moved, by at most 0.5" in str(report)
    as_dict = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert as_dict["moved"][1] == {"name": "3._mean", "values": 1, "size": 4, "max_abs": None}


def test_negative_zero_is_a_movement() -> None:
    model = nn.Sequential(nn.BatchNorm1D(2))
    freeze(model)
    model[0].bias.set_value(np.full(2, -0.0, np.float32))
    assert frozen_report(model).moved["0.bias"] == (2, 2, 0.0)


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
    ("model", "options", "message"),
    [
        (nn.Linear(2, 2), {}, "has no norm layer; see"),
        (network(), {"pattern": "head.*"}, "no norm layer whose path matches 'head.*' .of 2."),
        (network(), {"affine": False, "statistics": False}, "asked for neither γ, β nor statistics"),
        (paddle.Model(network()), {}, "its network is model.network"),
    ],
)
def test_bad_arguments(model: nn.Layer, options: dict[str, object], message: str) -> None:
    with pytest.raises(SurgeryError, match=message.replace("*", r"\*")) as caught:
        freeze(model, **options)
    assert "\n" not in str(caught.value)
