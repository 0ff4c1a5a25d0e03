"""Momentum that follows a curve: its shape, the layers that it sets, resuming, and the policy that says it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import nn

import flatwater.paddle as fw
from flatwater.errors import ConfigError, InputError, SurgeryError
from flatwater.momentum import MomentumCurve
from flatwater.policy import Policy

pytestmark = pytest.mark.filterwarnings("ignore:When training, we now always track:UserWarning")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm1D(3),
        nn.BatchNorm(3),
        fw.BatchNorm1D(3),
        fw.SyncBatchNorm(3),
        nn.BatchNorm1D(3),
        nn.GroupNorm(1, 3),
    )


def momenta(model: Any) -> list[float]:
    return [layer._momentum for layer in list(model)[:5]]


def test_curves() -> None:
    def values(curve: Any) -> list[float]:
        line = MomentumCurve({2: 0.5, 6: 0.9, 8: 0.7}, curve)
        return [line.value(step) for step in range(10)]

    np.testing.assert_allclose(values("linear"), [0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.9, 0.8, 0.7, 0.7], rtol=1e-15)
    assert values("constant") == [0.5] * 6 + [0.9, 0.9, 0.7, 0.7]
    quarter = 0.5 + 0.4 * (1 - math.cos(math.pi / 4)) / 2
    np.testing.assert_allclose(values("cosine"), [0.5, 0.5, 0.5, quarter, 0.7, 1.4 - quarter, 0.9, 0.8, 0.7, 0.7])


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.integers(0, 100), st.floats(0, 1), min_size=1, max_size=5),
    st.sampled_from(["linear", "cosine", "constant"]),
    st.integers(0, 120),
)
def test_a_curve_goes_through_its_places_and_stays_between_them(at: dict[int, float], curve: Any, step: int) -> None:
    line = MomentumCurve(at, curve)
    assert all(line.value(place) == momentum for place, momentum in at.items())
    assert min(at.values()) - 1e-12 <= line.value(step) <= max(at.values()) + 1e-12  # float64


@pytest.mark.parametrize(
    ("at", "settings", "message"),
    [
        ({}, {}, "says no momentum"),
        ({-1: 0.5}, {}, "at has -1, which is no step"),
        ({0.5: 0.5}, {"by": "epoch"}, "at has 0.5, which is no epoch"),
        ({0: 1.5}, {}, "momentum 1.5 at step 0 must be a number of 0 to 1"),
        ({0: True}, {}, "momentum True at step 0"),
        ({0: 0.5}, {"curve": "square"}, "curve='square' is none of linear, cosine, constant"),
        ({0: 0.5}, {"by": "hour"}, "by='hour' is none of step, epoch"),
    ],
)
def test_what_is_no_curve(at: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fw.MomentumSchedule(network(), at, **settings)


def test_all_batch_norms_follow_but_those_that_are_frozen() -> None:
    model = network()
    fw.freeze(model, pattern="4")
    schedule = fw.MomentumSchedule(model, {0: 0.5, 4: 0.9})
    assert momenta(model) == [0.5, 0.5, 0.5, 0.5, 0.9]
    assert schedule.step() == schedule.momentum == pytest.approx(0.6)
    assert momenta(model) == [schedule.momentum] * 4 + [0.9]
    fw.freeze(model, pattern="0")
    fw.thaw(model, pattern="4")
    fw.convert(model, "group_norm", pattern="1")
    schedule.step(2)
    assert momenta(model) == [pytest.approx(0.6), pytest.approx(0.6), *[pytest.approx(0.7)] * 3]


def test_the_statistics_move_by_it() -> None:
    for layer in (nn.BatchNorm1D(3), nn.BatchNorm(3), fw.BatchNorm1D(3)):
        schedule = fw.MomentumSchedule(layer, {0: 0.0, 1: 1.0}, curve="constant")
        x = paddle.to_tensor(np.random.default_rng(1).normal(2, 1, (8, 3)).astype("float32"))
        layer(x)
        np.testing.assert_allclose(layer._mean.numpy(), x.numpy().mean(axis=0), rtol=1e-6)  # all of the new
        schedule.step()
        before = layer._mean.numpy().tobytes()
        layer(x + 5)
        assert layer._mean.numpy().tobytes() == before  # all of the old


def test_it_goes_on_where_it_was() -> None:
    first, second = network(), network()
    one = fw.MomentumSchedule(first, {0: 0.5, 10: 0.99}, curve="cosine", pattern=["0", "2"])
    for _ in range(3):
        one.step()
    other = fw.MomentumSchedule(second, {0: 0.5, 10: 0.99}, curve="cosine", pattern=["0", "2"])
    other.set_state_dict(one.state_dict())
    assert other.position == 3
    assert momenta(first) == momenta(second)
    assert momenta(first)[1] == 0.9
    assert one.step() == other.step()
    with pytest.raises(InputError, match="is not the state of a MomentumSchedule"):
        other.set_state_dict({"last_epoch": 3})
    with pytest.raises(InputError, match="is not the state of a MomentumSchedule"):
        other.set_state_dict({"position": True})
    for wrong in (-1, 2.7, True, "2"):
        with pytest.raises(InputError, match=f"position={wrong!r} is no step"):
            other.step(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("by", "position"), [("step", 6), ("epoch", 2)])
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_it_is_a_callback(by: Any, position: int) -> None:
    network = nn.Sequential(nn.BatchNorm1D(3), nn.Linear(3, 1))
    model = paddle.Model(network)
    model.prepare(paddle.optimizer.SGD(0.1, parameters=network.parameters()), lambda y: (y * y).mean())
    seen = []

    class Watch(paddle.callbacks.Callback):
        def on_train_batch_begin(self, step: int, logs: Any = None) -> None:
            seen.append(network[0]._momentum)

    schedule = fw.MomentumSchedule(network, {0: 0.0, position: 0.6}, by=by)
    data = paddle.io.TensorDataset([paddle.to_tensor(np.random.default_rng(2).normal(size=(6, 3)).astype("float32"))])
    model.fit(data, batch_size=2, epochs=2, shuffle=False, verbose=0, callbacks=[schedule, Watch()])
    steps = range(6) if by == "step" else [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(seen, [0.6 * step / position for step in steps], rtol=1e-12)
    assert schedule.position == position


def test_what_has_no_momentum_to_set() -> None:
    with pytest.raises(SurgeryError, match="no batch norm layer; see"):
        fw.MomentumSchedule(nn.GroupNorm(1, 3), {0: 0.5})
    with pytest.raises(SurgeryError, match=r"no batch norm layer whose path matches 'x' \(of 5\)"):
        fw.MomentumSchedule(network(), {0: 0.5}, pattern=["x"])
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1D(3)), nn.BatchNorm1D(3))
    paddle.jit.to_static(model[0], full_graph=True)
    fw.MomentumSchedule(model, {0: 0.5}, pattern="1")
    with pytest.raises(SurgeryError, match=r"'0\.0' was captured by to_static"):
        fw.MomentumSchedule(model, {0: 0.5})


def test_a_policy_says_it() -> None:
    model = network()
    policy = Policy.parse(
        """
        - match: ["0", "1", "2", "3"]
          momentum_schedule: {at: {0: 0.5, 10: 1.0}}
        - match: "1"
          momentum: 0.8
        - match: "2"
          momentum_schedule: {at: {0: 0.1, 2: 0.3}, curve: constant, by: epoch}
        - match: "4"
          momentum: 0.7
        """
    )
    applied = fw.apply_policy(model, policy)
    assert momenta(model) == [0.5, 0.8, 0.1, 0.5, 0.7]
    assert "momentum 0.5 at step 0, 1 at step 10, linear between (the policy, line 3)" in str(applied)
    applied.on_step(4)
    applied.on_epoch(2)
    assert momenta(model) == [0.7, 0.8, 0.3, 0.7, 0.7]
    assert Policy.of(policy.model_dump(mode="json")) == policy
    applied.undo()
    assert momenta(model) == [0.9] * 5
    applied.on_step(8)
    assert momenta(model) == [0.9] * 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- momentum_schedule: {at: {}}", "line 1: .*says no momentum"),
        ("- momentum_schedule:\n    at: {0: 2}", "line 2: .*momentum 2.0 at step 0 must be"),
        (
            "- momentum_schedule: {at: {0: 0.5}, curv: cosine}",
            "line 1: unknown key .*curv; did you mean momentum_schedule.curve",
        ),
        ("- momentum_schedule: {at: {0: 0.5}}\n  momentum: 0.5", "line 2: .*momentum contradicts momentum_schedule"),
        ("- momentum_schedule: {at: {0: 0.5}}\n  norm: gn", "line 1: .*momentum_schedule contradicts norm=group_norm"),
        ("training: {batch_size: 0}\nrules:\n- norm: auto", "line 1: training.batch_size=0"),
        ("training: {input_spec: [{shape: []}]}\nrules:\n- norm: auto", "line 1: training.input_spec.0.shape"),
    ],
)
def test_errors_of_policies_name_the_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Policy.parse(text, "norms.yaml")
    with pytest.raises(ConfigError, match="has no effect on any layer"):
        fw.apply_policy(nn.GroupNorm(1, 3), [{"momentum_schedule": {"at": {0: 0.5}}}])
