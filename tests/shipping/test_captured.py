"""Models that ``to_static`` captured: what surgery and policies change holds at the next call, or is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest
from networks import example, randomize
from paddle import nn

import flatwater.paddle as fw
from flatwater.errors import SurgeryError

# Paddle's BatchNorm2D says in every training step that it tracks statistics.
pytestmark = pytest.mark.filterwarnings("ignore:When training, we now always track:UserWarning")

X = (4, 3, 5, 5)


class Plain(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.norm(self.conv(x))


class Decorated(Plain):
    @paddle.jit.to_static(full_graph=True)
    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.norm(self.conv(x))


def captured(make: Callable[[], nn.Layer], *, full_graph: bool = True) -> Any:
    """A model that was captured and called in ``train()``; a decorated class needs no more than the call."""
    model = randomize(make())
    if make is not Decorated:
        model = paddle.jit.to_static(model, full_graph=full_graph)
    model.train()
    model(example(*X))
    return model


def moved(model: Any) -> bool:
    """Whether training steps move the statistics."""
    before = model.norm._mean.numpy().copy()
    for shift in (1, 2):
        model(example(*X) + shift)
    return not np.array_equal(model.norm._mean.numpy(), before)


@pytest.mark.parametrize("make", [Plain, Decorated])
def test_a_captured_layer_is_frozen_and_thawed(make: Callable[[], nn.Layer]) -> None:
    model = captured(make)
    assert moved(model)
    fw.freeze(model)
    assert not moved(model)
    assert fw.frozen_report(model).ok
    y = model(example(*X))
    y.sum().backward()
    assert model.norm.weight.grad is None
    assert model.conv.weight.grad is not None
    fw.thaw(model)
    assert moved(model)


@pytest.mark.parametrize("full_graph", [True, False])
def test_what_a_policy_freezes_later_is_frozen_in_what_was_captured_before(full_graph: bool) -> None:
    model = randomize(Plain())
    applied = fw.apply_policy(model, [{"freeze": {"what": "both", "from_step": 1}}])
    model = paddle.jit.to_static(model, full_graph=full_graph)
    applied.on_step(0)
    assert moved(model)
    applied.on_step(1)
    assert not moved(model)
    assert fw.frozen_report(model).ok
    applied.undo()
    assert moved(model)


@pytest.mark.parametrize("make", [Plain, Decorated])
def test_a_captured_layer_becomes_another_kind_and_comes_back(make: Callable[[], nn.Layer]) -> None:
    model, x = captured(make), example(*X)
    before = model(x).numpy()
    expected = nn.functional.group_norm(model.conv(x), 2, 1e-5, model.norm.weight, model.norm.bias).numpy()
    assert fw.convert(model, "group_norm", groups=2).changed == ["norm"]
    np.testing.assert_allclose(model(x).numpy(), expected, rtol=1e-4, atol=1e-5)  # float32, two operators
    assert fw.revert(model).changed == ["norm"]
    np.testing.assert_allclose(model(x).numpy(), before, rtol=1e-5, atol=1e-6)


def test_a_captured_layer_takes_what_a_policy_sets() -> None:
    model, x = captured(Plain), example(*X)
    before = model(x).numpy()
    fw.apply_policy(model, [{"epsilon": 0.5}])
    assert np.abs(model(x).numpy() - before).max() > 1e-2


@pytest.mark.parametrize("surgery", [fw.convert, fw.revert, lambda model: fw.convert(model, "group_norm")])
def test_a_norm_that_was_captured_itself_is_left(surgery: Callable[[nn.Layer], Any]) -> None:
    # The captured forward stays with the layer: another class would have one that nobody calls.
    kind = fw.BatchNorm2D if surgery is fw.revert else nn.BatchNorm2D
    model = nn.Sequential(nn.Conv2D(3, 4, 1), kind(4))
    paddle.jit.to_static(model[1], full_graph=True)
    assert "captured by to_static" in surgery(model).left["1"]
    assert type(model[1]) is kind


@pytest.mark.parametrize("make", [Plain, Decorated])
def test_momentum_does_not_follow_a_schedule_in_a_program(make: Callable[[], nn.Layer]) -> None:
    with pytest.raises(SurgeryError, match="'norm' was captured by to_static"):
        fw.MomentumSchedule(captured(make), {0: 0.5})
    if make is Plain:
        model = make()
        schedule = fw.MomentumSchedule(model, {0: 0.5, 10: 0.9})
        paddle.jit.to_static(model, full_graph=True)
        with pytest.raises(SurgeryError, match="full_graph=False"):
            schedule.step()
        assert schedule.position == 0


@pytest.mark.parametrize("make", [Plain, Decorated])
def test_nobody_can_see_what_a_program_reads(make: Callable[[], nn.Layer]) -> None:
    model = captured(make)
    before = model.norm._mean.numpy().copy()
    with pytest.raises(SurgeryError, match="'norm' was captured by to_static"), fw.accumulate_statistics(model):
        model(example(*X))
    assert np.array_equal(model.norm._mean.numpy(), before)


@pytest.mark.parametrize(
    "surgery", [fw.convert, fw.convert_sync_batchnorm, lambda model: fw.convert(model, "group_norm")]
)
def test_what_a_call_leaves_in_a_layer_is_no_obstacle(surgery: Callable[[nn.Layer], Any]) -> None:
    # full_graph=False leaves the class's own forward in the instance, where that of another class would not be called.
    model = captured(Plain, full_graph=False)
    model.norm.forward = type(model.norm).forward.__get__(model.norm)
    model.eval()
    assert surgery(model).changed == ["norm"]
    assert "forward" not in vars(model.norm)
    x = example(*X)
    expected = model.norm(model.conv(x)).numpy()
    np.testing.assert_allclose(model(x).numpy(), expected, rtol=1e-5, atol=1e-6)  # float32, eager and captured


class Branches(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2D(3)
        self.a, self.b = nn.Sequential(norm), nn.Sequential(norm)


class Features(Plain):
    @paddle.jit.to_static(full_graph=True)
    def features(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.norm(self.conv(x))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.features(x)


def test_a_captured_layer_is_found_by_any_path_and_method() -> None:
    model = Branches()
    paddle.jit.to_static(model.b, full_graph=True)
    with pytest.raises(SurgeryError, match=r"'a\.0' was captured by to_static"):
        fw.MomentumSchedule(model, {0: 0.5})
    features = Features()
    features(example(*X))
    with pytest.raises(SurgeryError, match="'norm' was captured by to_static"):
        fw.MomentumSchedule(features, {0: 0.5})
    fw.freeze(features)
    assert not moved(features)
