"""Folding beyond the pair of a convolution and the norm behind it: copies, what follows, norms into norms, sharing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from networks import evaluate, example, randomize, state_of
from paddle import nn

from flatwater.errors import StatisticsError, SurgeryError
from flatwater.paddle.surgery.fold import fold

# Relative to the largest output, float32: a few layers of other rounding.
NEAR = 2e-6


class Net(nn.Layer):
    """Layers by name, wired by a function of them and the input."""

    def __init__(self, wiring: Callable[[Any, paddle.Tensor], Any], **layers: nn.Layer) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.wiring = wiring

    def forward(self, x: paddle.Tensor) -> Any:
        return self.wiring(self, x)


def check(model: nn.Layer, x: paddle.Tensor, folded: set[tuple[str, str]]) -> Any:
    """Fold, compare the pairs and the outputs, and undo bit for bit."""
    randomize(model)
    before, expected = state_of(model), evaluate(model, x)
    report = fold(model, x)
    assert {tuple(pair) for pair in report.folded} == folded, str(report)
    assert np.abs(evaluate(model, x) - expected).max() <= NEAR * np.abs(expected).max()
    report.undo()
    after = state_of(model)
    assert list(after) == list(before)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    return report


@pytest.mark.parametrize(
    ("norm", "linear", "shape"),
    [
        (lambda: nn.BatchNorm2D(4), lambda: nn.Conv2D(4, 6, 3), (2, 4, 7, 8)),
        (lambda: nn.BatchNorm2D(4), lambda: nn.Conv2D(4, 6, 3, bias_attr=False), (2, 4, 7, 8)),
        (lambda: nn.BatchNorm2D(4), lambda: nn.Conv2D(4, 6, 3, groups=2), (2, 4, 7, 8)),
        (lambda: nn.BatchNorm2D(4), lambda: nn.Conv2D(4, 8, 3, groups=4), (2, 4, 7, 8)),
        (lambda: nn.BatchNorm2D(4), lambda: nn.Conv2D(4, 6, 3, dilation=2, stride=2), (2, 4, 9, 9)),
        (lambda: nn.BatchNorm2D(4), lambda: nn.Conv2D(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 8)),
        (lambda: nn.BatchNorm2D(4), lambda: nn.Conv2D(4, 6, 1, padding="same"), (2, 4, 7, 8)),
        (lambda: nn.BatchNorm2D(4), lambda: nn.Conv2DTranspose(4, 6, 1, groups=2), (2, 4, 5, 6)),
        (lambda: nn.BatchNorm1D(4), lambda: nn.Linear(4, 6), (5, 4)),
        (lambda: nn.BatchNorm(4), lambda: nn.Linear(4, 6, bias_attr=False), (5, 4)),
        (lambda: nn.BatchNorm1D(4), lambda: nn.Conv1D(4, 6, 2), (2, 4, 9)),
    ],
    ids=[
        "conv", "no bias", "grouped", "depthwise", "dilated", "reflecting", "1x1 same", "transposed 1x1", "linear",
        "linear, no bias", "conv1d",
    ],
)  # fmt: skip
def test_a_norm_goes_into_the_layer_behind_it(
    norm: Callable[[], nn.Layer], linear: Callable[[], nn.Layer], shape: tuple[int, ...]
) -> None:
    model = Net(lambda net, x: net.linear(net.norm(F.relu(x))), norm=norm(), linear=linear())
    check(model, example(*shape), {("linear", "norm")})


@pytest.mark.parametrize(
    "linear",
    [lambda: nn.Conv2D(4, 6, 3, padding=1), lambda: nn.Conv2DTranspose(4, 6, 3, stride=2, groups=2)],
    ids=["padded", "overlapping"],
)
def test_only_a_scale_goes_into_a_convolution_with_borders(linear: Callable[[], nn.Layer]) -> None:
    wiring = lambda net, x: net.linear(net.norm(F.relu(x)))  # noqa: E731
    x = example(2, 4, 6, 6)
    left = check(Net(wiring, norm=nn.BatchNorm2D(4), linear=linear()), x, set()).left["norm"]
    assert "'linear', which reads it, pads with zeros or overlaps" in left
    scale_only = Net(wiring, norm=nn.BatchNorm2D(4, bias_attr=False), linear=linear())
    randomize(scale_only)
    scale_only.norm._mean.zero_()
    expected = evaluate(scale_only, x)
    assert len(fold(scale_only, x).folded) == 1
    assert np.abs(evaluate(scale_only, x) - expected).max() <= NEAR * np.abs(expected).max()


@pytest.mark.parametrize("attributes", [{"weight_attr": False}, {"bias_attr": False}], ids=["shift only", "scale only"])
def test_norms_with_one_parameter_fold_in_every_direction(attributes: dict[str, bool]) -> None:
    first = Net(lambda net, x: net.norm(net.conv(x)), conv=nn.Conv2D(4, 6, 3), norm=nn.BatchNorm2D(6, **attributes))
    check(first, example(2, 4, 6, 6), {("conv", "norm")})
    behind = Net(
        lambda net, x: net.conv(net.norm(F.relu(x))), norm=nn.BatchNorm2D(4, **attributes), conv=nn.Conv2D(4, 6, 3)
    )
    check(behind, example(2, 4, 6, 6), {("conv", "norm")})
    norms = Net(
        lambda net, x: net.second(net.norm(F.relu(x))),
        norm=nn.BatchNorm2D(4, **attributes),
        second=nn.BatchNorm2D(4, weight_attr=False, bias_attr=False),
    )
    check(norms, example(2, 4, 6, 6), {("second", "norm")})


def test_a_chain_of_norms_goes_into_the_convolution_before_it() -> None:
    layers = {
        "conv": nn.Conv2D(4, 6, 3),
        "one": nn.BatchNorm2D(6),
        "two": nn.BatchNorm2D(6),
        "three": nn.BatchNorm2D(6),
    }
    model = Net(lambda net, x: net.three(net.two(net.one(net.conv(x)))), **layers)
    report = check(model, example(2, 4, 6, 6), {("conv", "one"), ("three", "two"), ("conv", "three")})
    assert not report.left


# What lies between the convolutions and the norm, and into which of them it goes.
COPIES: dict[str, tuple[Callable[[Any, paddle.Tensor], Any], int, set[str]]] = {
    "sliced": (lambda net, x: net.conv(x)[:, :, 1:, 1:], 4, {"conv"}),
    "joined": (lambda net, x: paddle.concat([net.conv(x), net.other(x)], axis=1), 8, {"conv", "other"}),
    "split in channels": (lambda net, x: paddle.split(net.conv(x), 2, axis=1)[1], 2, {"conv"}),
    "shuffled": (
        lambda net, x: net.conv(x).reshape([2, 2, 2, 6, 6]).transpose([0, 2, 1, 3, 4]).reshape([2, 4, 6, 6]),
        4,
        {"conv"},
    ),
    "dropped out": (lambda net, x: F.dropout(net.conv(x), 0.5, training=net.training), 4, {"conv"}),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_norm_that_reads_copies_is_folded(copy: str) -> None:
    wiring, channels, into = COPIES[copy]
    model = Net(
        lambda net, x: F.relu(net.norm(wiring(net, x))),
        conv=nn.Conv2D(4, 4, 3, padding=1),
        other=nn.Conv2D(4, 4, 1),
        norm=nn.BatchNorm2D(channels),
    )
    check(model, example(2, 4, 6, 6), {(conv, "norm") for conv in into})


def test_a_linear_layer_whose_rows_are_flattened_before_the_norm_is_folded() -> None:
    model = Net(
        lambda net, x: net.norm(net.linear(x).flatten(0, 1)).reshape([2, 5, 6]),
        linear=nn.Linear(4, 6),
        norm=nn.BatchNorm1D(6),
    )
    check(model, example(2, 5, 4), {("linear", "norm")})


def test_a_norm_that_is_flattened_before_a_linear_layer_is_folded_feature_by_feature() -> None:
    model = Net(
        lambda net, x: net.linear(net.norm(F.relu(x)).flatten(1)), norm=nn.BatchNorm2D(4), linear=nn.Linear(36, 5)
    )
    check(model, example(2, 4, 3, 3), {("linear", "norm")})


# What looks like a copy to some inputs.
NO_COPIES: dict[str, Callable[[paddle.Tensor], paddle.Tensor]] = {
    "relu": F.relu,
    "leaky relu": F.leaky_relu,
    "clip": lambda y: y.clip(-6, 6),
    "maximum": lambda y: F.max_pool2d(y, 3, 1, 1),
    "median": lambda y: y.unfold(3, 3, 1).median(axis=-1),
    "sorted": lambda y: y.sort(axis=-1),
    "padded": lambda y: F.pad(y, [1, 1, 1, 1]),
    "flipped sign": lambda y: -y,
    "mean": lambda y: F.avg_pool2d(y, 2),
}


@pytest.mark.parametrize("operation", NO_COPIES)
def test_what_changes_values_is_no_copy(operation: str) -> None:
    model = Net(
        lambda net, x: net.norm(NO_COPIES[operation](net.conv(x))),
        conv=nn.Conv2D(4, 4, 3, padding=1),
        norm=nn.BatchNorm2D(4),
    )
    left = check(model, example(2, 4, 6, 6), set()).left["norm"]
    assert "was not written by a convolution or Linear layer" in left


def test_a_convolution_that_runs_on_several_sizes_before_one_norm_is_folded_once() -> None:
    model = Net(
        lambda net, x: net.norm(net.conv(x)).mean() + net.norm(net.conv(x[:, :, ::2, ::2])).mean([2, 3]),
        conv=nn.Conv2D(4, 6, 3, bias_attr=False),
        norm=nn.BatchNorm2D(6),
    )
    check(model, example(2, 4, 9, 9), {("conv", "norm")})


def test_convolutions_that_share_a_weight_fold_if_their_norms_agree() -> None:
    def build() -> nn.Layer:
        model = Net(
            lambda net, x: F.relu(net.norm(net.conv(x))) + net.norm2(net.conv2(F.relu(x))),
            conv=nn.Conv2D(4, 6, 3), norm=nn.BatchNorm2D(6), conv2=nn.Conv2D(4, 6, 3), norm2=nn.BatchNorm2D(6),
        )  # fmt: skip
        model.conv2.weight = model.conv.weight
        return randomize(model)

    x = example(2, 4, 6, 6)
    model = build()
    expected = evaluate(model, x)
    report = fold(model, x)
    assert not report.folded
    assert "shares a parameter with 'conv2'" in report.left["norm"]

    model = build()
    model.norm2.set_state_dict(model.norm.state_dict())
    expected = evaluate(model, x)
    assert {tuple(pair) for pair in fold(model, x).folded} == {("conv", "norm"), ("conv2", "norm2")}
    assert model.conv.weight is model.conv2.weight
    assert np.abs(evaluate(model, x) - expected).max() <= NEAR * np.abs(expected).max()


def test_of_a_repvgg_block_the_branch_without_a_convolution_stays() -> None:
    model = Net(
        lambda net, x: F.relu(net.norm3(net.conv3(y := F.relu(x))) + net.norm1(net.conv1(y)) + net.identity(y)),
        conv3=nn.Conv2D(4, 4, 3, padding=1), norm3=nn.BatchNorm2D(4), conv1=nn.Conv2D(4, 4, 1), norm1=nn.BatchNorm2D(4),
        identity=nn.BatchNorm2D(4),
    )  # fmt: skip
    report = check(model, example(2, 4, 6, 6), {("conv3", "norm3"), ("conv1", "norm1")})
    assert list(report.left) == ["identity"]


def test_a_norm_whose_output_is_read_by_more_than_a_convolution_stays() -> None:
    model = Net(lambda net, x: net.conv(y := net.norm(F.relu(x))) + y, norm=nn.BatchNorm2D(4), conv=nn.Conv2D(4, 4, 1))
    assert "something besides 'conv' reads the output of it" in check(model, example(2, 4, 6, 6), set()).left["norm"]


def test_zero_scales_and_tiny_variances_give_finite_weights() -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4)))
    model[1].weight.set_value(np.array([0, 1, 1, 0], np.float32))
    model[1]._variance.set_value(np.array([0, 1e-30, 1, 1], np.float32))
    x = example(2, 3, 6, 6)
    expected = evaluate(model, x)
    assert len(fold(model, x).folded) == 1
    assert np.isfinite(model[0].weight.numpy()).all()
    assert np.abs(evaluate(model, x) - expected).max() <= NEAR * np.abs(expected).max()


def test_a_weight_that_its_dtype_does_not_hold_is_not_written() -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1, bias_attr=False), nn.BatchNorm2D(4, epsilon=0.0)))
    model[0].weight.set_value(model[0].weight * 1e30)
    model[1]._mean.zero_()
    model[1]._variance.set_value(np.full(4, 1e-36, np.float32))
    x = example(2, 3, 6, 6) * 1e-30
    before, expected = state_of(model), evaluate(model, x)
    assert np.isfinite(expected).all()
    assert fold(model, x).left == {"1": "the folded weight or bias would not be finite"}
    assert all(np.array_equal(value, before[name]) for name, value in state_of(model).items())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_no_numbers_change_nothing(value: float) -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4), nn.Conv2D(4, 4, 1), nn.BatchNorm2D(4)))
    model[3]._mean[1] = value
    before = state_of(model)
    with pytest.raises(StatisticsError, match=r"norm layer '3' is .* in channel 1"):
        fold(model, example(2, 3, 6, 6))
    assert all(np.array_equal(one, before[name], equal_nan=True) for name, one in state_of(model).items())


def test_a_model_that_fails_after_its_norms_is_left_as_it_was() -> None:
    model = randomize(
        Net(lambda net, x: net.norm(net.conv(x)).reshape([7, 7]), conv=nn.Conv2D(4, 4, 1), norm=nn.BatchNorm2D(4))
    )
    before, hooks = state_of(model), len(model.norm._forward_post_hooks)
    with pytest.raises(SurgeryError, match="does not run on the example inputs"):
        fold(model, example(2, 4, 6, 6))
    assert all(np.array_equal(value, before[name]) for name, value in state_of(model).items())
    assert len(model.norm._forward_post_hooks) == hooks
    assert model.training


def test_a_model_that_multiplies_rounding_is_allowed_what_it_does_itself() -> None:
    """Its output moves by 40 times what its inputs move by, per unit in the last place far beyond a tight tolerance."""

    def amplify(net: Any, x: paddle.Tensor) -> paddle.Tensor:
        y = net.norm(net.conv(x))
        return F.relu(y - y.mean() + 1e4) - 1e4

    model = randomize(Net(amplify, conv=nn.Conv2D(4, 4, 3), norm=nn.BatchNorm2D(4)))
    x = example(2, 4, 6, 6)
    report = fold(model, x)
    assert len(report.folded) == 1
    assert report.max_rel <= report.tolerance <= 1e-2
    report.undo()
    strict = fold(model, x, tolerance=1e-12)
    assert not strict.folded
    assert "this model multiplies rounding" in strict.left["norm"] or "taken back" in strict.left["norm"]
