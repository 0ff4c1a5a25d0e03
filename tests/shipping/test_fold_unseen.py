"""Folding where the example inputs show nothing: what stands between two layers, and what else the model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest
from networks import evaluate, example, randomize, state_of
from paddle import nn

from flatwater.errors import InputError, SurgeryError
from flatwater.paddle.surgery.fold import fold

FIFTY = 50.0
BETWEEN: dict[str, Callable[[paddle.Tensor], paddle.Tensor]] = {
    "bounds in place": lambda y: y.clip_(-FIFTY, FIFTY),
    "bounds": lambda y: y.clip(-FIFTY, FIFTY),
    "upper bound": lambda y: y.clip(max=FIFTY),
    "lower bound": lambda y: y.clip(min=-FIFTY),
    "minimum": lambda y: paddle.minimum(y, paddle.to_tensor(FIFTY)),
    "where": lambda y: paddle.where(y > FIFTY, paddle.full_like(y, FIFTY), y),
    "small negatives": lambda y: paddle.where((y < 0) & (y > -1e-6), paddle.zeros_like(y), y),
}
"""What leaves the example inputs' values as they are, and others not."""


class Net(nn.Layer):
    def __init__(self, wiring: Callable[..., Any], **layers: nn.Layer) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.wiring = wiring

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wiring(self, *args, **kwargs)


@pytest.mark.parametrize("how", ["in the code", "in a hook"])
@pytest.mark.parametrize("behind", ["conv", "norm"])
@pytest.mark.parametrize("between", BETWEEN)
def test_what_other_inputs_change_is_no_copy(between: str, behind: str, how: str) -> None:
    first, second = (
        (nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4)) if behind == "conv" else (nn.BatchNorm2D(3), nn.Conv2D(3, 4, 3))
    )
    change = BETWEEN[between] if how == "in the code" else lambda y: y
    model = randomize(Net(lambda net, x: net.second(change(net.first(x))), first=first, second=second))
    if how == "in a hook":
        model.first.register_forward_post_hook(lambda layer, inputs, output: BETWEEN[between](output))
    others = [300.0 * example(2, 3, 8, 8), 1e-8 * example(2, 3, 8, 8)]
    expected = [evaluate(model, x) for x in others]
    assert not fold(model, example(2, 3, 8, 8)).folded
    assert all(np.array_equal(evaluate(model, x), y) for x, y in zip(others, expected, strict=True))


@pytest.mark.parametrize("hook", [lambda layer, inputs, output: None, lambda layer, inputs, output: output + 0])
def test_a_hook_that_only_looks_keeps_nothing_from_being_folded(hook: Any) -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4)))
    for layer in model:
        layer.register_forward_post_hook(hook)
    assert len(fold(model, example(2, 3, 8, 8)).folded) == 1


def test_a_norm_takes_nothing_into_a_parameter_that_another_norm_has_too() -> None:
    model = randomize(
        Net(
            lambda net, x: net.two(net.one(x)) if x.shape[-1] < 10 else net.three(x),
            one=nn.BatchNorm2D(3), two=nn.BatchNorm2D(3), three=nn.BatchNorm2D(3),
        )
    )  # fmt: skip
    model.three.weight = model.two.weight
    x = example(2, 3, 16, 16)
    expected = evaluate(model, x)
    left = fold(model, example(2, 3, 8, 8)).left
    assert "shares a parameter with 'three'" in left["one"]
    np.testing.assert_array_equal(evaluate(model, x), expected)


class Held:
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize(
    "read",
    [
        lambda y: y.numpy(),
        lambda y: y.mean().item(),
        lambda y: Held(y),
        lambda y: {"inner": [Held(y.numpy())], 3: None},
    ],
    ids=["array", "number", "object", "nested"],
)
def test_outputs_that_are_no_tensors_are_watched_too(read: Callable[[paddle.Tensor], Any]) -> None:
    def wiring(net: Any, x: paddle.Tensor) -> Any:
        y = net.conv(x)
        return net.norm(y), read(y)

    model = randomize(Net(wiring, conv=nn.Conv2D(3, 4, 3), norm=nn.BatchNorm2D(4)))
    assert "something besides it" in fold(model, example(2, 3, 8, 8)).left["norm"]


class Counting(nn.Layer):
    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.fails = nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4), fails
        self.register_buffer("calls", paddle.zeros([1]))
        self.register_buffer("average", paddle.zeros([1]))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * x.mean()
        x.scale_(2.0)  # the caller's
        y = self.norm(self.conv(x))
        if self.fails:
            raise ValueError("no")
        return y + float(np.random.random()) * 0  # noqa: NPY002 # the stream that models draw from


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_inputs_and_random_numbers_are_as_they_were(fails: bool) -> None:
    model = randomize(Counting(fails=fails))
    x = example(2, 3, 8, 8)
    before, input_before, stream = state_of(model), x.numpy().copy(), np.random.get_state()[1].copy()  # noqa: NPY002
    if fails:
        with pytest.raises(SurgeryError, match="no; give"):
            fold(model, x)
    else:
        report = fold(model, x)
        assert len(report.folded) == 1
        assert [model.calls.item(), model.average.item()] == [0.0, 0.0]
        report.undo()
    after = state_of(model)
    assert list(after) == list(before)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    np.testing.assert_array_equal(x.numpy(), input_before)
    np.testing.assert_array_equal(np.random.get_state()[1], stream)  # noqa: NPY002


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf"), "a", True])
def test_a_tolerance_that_is_none_is_refused(tolerance: Any) -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4)))
    with pytest.raises(InputError, match="tolerance="):
        fold(model, example(2, 3, 8, 8), tolerance=tolerance)
    assert isinstance(model[1], nn.BatchNorm2D)


@pytest.mark.parametrize("call", ["a dict", "a dict by name", "a list", "a number"])
def test_models_are_called_as_users_call_them(call: str) -> None:
    x = example(2, 3, 8, 8)
    wiring, inputs = {
        "a dict": (lambda net, given: net.norm(net.conv(given["image"])), [{"image": x, "scale": None}]),
        "a dict by name": (lambda net, given: net.norm(net.conv(given["image"])), {"given": {"image": x}}),
        "a list": (lambda net, given: net.norm(net.conv(given[0] + given[1])), [[x, x]]),
        "a number": (lambda net, given, factor: net.norm(net.conv(given)) * factor, [x, 3]),
    }[call]
    model = randomize(Net(wiring, conv=nn.Conv2D(3, 4, 3), norm=nn.BatchNorm2D(4)))
    assert len(fold(model, inputs).folded) == 1
