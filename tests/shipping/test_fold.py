"""Folding: what is folded is right, what cannot be is left with a reason, and everything can be undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from networks import CONV_KINDS, UNFOLDABLE, Wired, evaluate, example, randomize, state_of
from paddle import nn

import flatwater.paddle as fw
from flatwater.errors import InputError, StatisticsError, SurgeryError
from flatwater.paddle.surgery.fold import fold
from flatwater.paddle.surgery.folded import FoldedNorm

# Relative to the largest output, float32: a layer or two of other rounding. A hundred layers get 1e-5.
NEAR = 2e-6


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("kind", CONV_KINDS)
def test_every_kind_of_linear_layer_is_folded(kind: str) -> None:
    build, shape = CONV_KINDS[kind]
    model = randomize(nn.Sequential(*build()))
    x = example(*shape)
    norms = [path for path, layer in model.named_sublayers() if hasattr(layer, "_variance")]
    if kind == "synchronised":  # has no CPU kernel; the same layer without synchronising says what is right
        model[1].__class__ = nn.BatchNorm2D
    expected = evaluate(model, x)
    if kind == "synchronised":
        model[1].__class__ = nn.SyncBatchNorm

    report = fold(model, x)

    assert [pair.norm for pair in report.folded] == norms
    assert not report.left
    assert not [layer for layer in model.sublayers() if hasattr(layer, "_variance")]
    assert relative(evaluate(model, x), expected) < NEAR
    assert report.max_rel < NEAR


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small"])
@pytest.mark.parametrize("ours", [False, True], ids=["stock", "converted"])
def test_networks_fold_completely_and_unfold_bit_for_bit(name: str, ours: bool) -> None:
    model = randomize(getattr(paddle.vision.models, name)(pretrained=False))
    if ours:
        fw.convert(model)
    x = example(2, 3, 64, 64)
    before, expected = state_of(model), evaluate(model, x)
    norms = sum(hasattr(layer, "_variance") for layer in model.sublayers())

    report = fold(model, x)

    assert len(report.folded) == norms > 0
    assert not report.left
    assert relative(evaluate(model, x), expected) < 1e-5
    assert all(layer.training for layer in model.sublayers())

    report.undo()
    after = state_of(model)
    assert list(after) == list(before)
    assert all(np.array_equal(after[key], before[key]) for key in before)
    assert np.array_equal(evaluate(model, x), expected)


@pytest.mark.parametrize("wiring", UNFOLDABLE)
def test_what_cannot_be_folded_is_left_with_a_reason(wiring: str) -> None:
    function, reason = UNFOLDABLE[wiring]
    model = randomize(Wired(function))
    x = example(2, 4, 6, 6)
    expected = evaluate(model, x)

    report = fold(model, x)

    assert [tuple(pair) for pair in report.folded] == [("conv2", "norm2")]
    assert list(report.left) == ["norm"]
    assert reason in report.left["norm"]
    assert relative(evaluate(model, x), expected) < NEAR


def test_two_norms_on_one_convolution() -> None:
    model = randomize(Wired(lambda net, x: net.norm(y := net.conv(x)) + net.norm2(y)))
    report = fold(model, example(2, 4, 6, 6))
    assert not report.folded
    assert "another norm layer" in report.left["norm"]
    assert "another norm layer" in report.left["norm2"]


def test_a_residual_block_of_ours() -> None:
    class Block(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = fw.ConvBNLayer(4, 4), fw.ConvBNLayer(4, 4, act="leaky_relu")

        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            return self.second(self.first(x), x)

    model = randomize(Block())
    x = example(2, 4, 6, 6)
    expected = evaluate(model, x)
    report = fold(model, x)
    assert [pair.norm for pair in report.folded] == ["first.bn", "second.bn"]
    assert isinstance(model.second.bn, FoldedNorm)
    assert relative(evaluate(model, x), expected) < NEAR


def test_a_residual_that_is_the_convolution_itself_is_not_folded() -> None:
    class Net(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2D(4, 4, 1), fw.BatchNorm2D(4)

        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            y = self.conv(x)
            return self.norm(y, y)

    report = fold(randomize(Net()), example(2, 4, 6, 6))
    assert "something besides it" in report.left["norm"]


def test_one_norm_at_two_paths_is_replaced_at_both() -> None:
    model = randomize(Wired(lambda net, x: net.alias(net.conv(x))))
    model.alias = model.norm
    norm, x = model.norm, example(2, 4, 6, 6)
    expected = evaluate(model, x)
    report = fold(model, x)
    assert model.alias is model.norm
    assert isinstance(model.norm, FoldedNorm)
    assert relative(evaluate(model, x), expected) < NEAR
    report.undo()
    assert model.alias is model.norm is norm


def test_a_norm_that_runs_through_a_plain_list_is_taken_back() -> None:
    model = randomize(Wired(lambda net, x: net.norm2(net.conv2(net.hidden[0](net.conv(x))))))
    model.hidden = [model.norm]
    x = example(2, 4, 6, 6)
    expected, norm = evaluate(model, x), model.norm
    report = fold(model, x)
    assert [pair.norm for pair in report.folded] == ["norm2"]
    assert "taken back" in report.left["norm"]
    assert model.norm is norm
    assert relative(evaluate(model, x), expected) < NEAR


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda net, x: F.conv2d(x, net.conv.weight, padding=1), "moved what 'norm2' writes by"),
        (
            lambda net, x: F.batch_norm(x, net.norm._mean, net.norm._variance, net.norm.weight, net.norm.bias),
            "made the model fail (AttributeError: 'FoldedNorm' object has no attribute '_mean')",
        ),
    ],
    ids=["the convolution's weight", "the norm's statistics"],
)
def test_a_pair_whose_tensors_the_model_uses_by_itself_is_taken_back(
    use: Callable[[Any, paddle.Tensor], paddle.Tensor], reason: str
) -> None:
    x = example(2, 4, 7, 8)
    model = randomize(Wired(lambda net, x: net.norm2(net.conv2(net.norm(net.conv(x)) + use(net, x)))))
    before, expected = state_of(model), evaluate(model, x)
    report = fold(model, x)
    assert [pair.norm for pair in report.folded] == ["norm2"]
    assert reason in report.left["norm"]
    assert relative(evaluate(model, x), expected) < NEAR
    report.undo()
    after = state_of(model)
    assert list(after) == list(before)
    assert all(np.array_equal(after[key], before[key]) for key in before)


def test_a_wrong_fold_never_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    import flatwater.surgery.fold as surgery

    right = surgery.affine_after

    def wrong_for_nine_rows(linear: Any, affine: Any) -> Any:
        weight, bias = right(linear, affine)
        return (weight * 1.01, bias) if weight.shape[1] == 9 else (weight, bias)

    model = randomize(nn.Sequential(nn.Conv2D(3, 9, 1), nn.BatchNorm2D(9), nn.Conv2D(9, 4, 1), nn.BatchNorm2D(4)))
    x = example(2, 3, 6, 6)
    before, expected = state_of(model), evaluate(model, x)
    monkeypatch.setattr(surgery, "affine_after", wrong_for_nine_rows)
    report = fold(model, x)
    assert [pair.norm for pair in report.folded] == ["1"]
    assert "moved what '3' writes" in report.left["3"]
    assert relative(evaluate(model, x), expected) < NEAR
    assert np.array_equal(model[2].weight.numpy(), before["2.weight"])


def test_a_wrong_fold_does_not_hide_behind_a_head_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    import flatwater.surgery.fold as surgery

    head = nn.Conv2D(4, 2, 1, weight_attr=nn.initializer.Constant(0.0))
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4), head))
    right = surgery.affine_after
    monkeypatch.setattr(
        surgery, "affine_after", lambda linear, affine: tuple(1.01 * one for one in right(linear, affine))
    )
    report = fold(model, example(2, 3, 6, 6))
    assert not report.folded
    assert "taken back" in report.left["1"]


def test_hooks_modes_and_gradients_stay() -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1, bias_attr=False), nn.BatchNorm2D(4), nn.Dropout(0.5)))
    model[2].eval()
    model[0].weight.stop_gradient = True
    calls: list[int] = []
    handle = model[1].register_forward_post_hook(lambda layer, inputs, output: calls.append(1))
    name = model[0].weight.name
    x = example(2, 3, 6, 6)
    report = fold(model, x)
    assert [layer.training for layer in model] == [True, True, False]
    assert model[0].weight.name == name
    assert model[0].weight.stop_gradient
    assert not model[0].bias.stop_gradient
    calls.clear()
    model(x)
    assert calls == [1]
    handle.remove()
    model(x)
    assert calls == [1]
    report.undo()
    assert model[0].bias is None
    assert "bias" not in model[0]._parameters


def test_a_hook_that_changes_the_convolution_is_respected() -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4)))
    model[0].register_forward_post_hook(lambda layer, inputs, output: output * 2)
    x = example(2, 3, 6, 6)
    expected = evaluate(model, x)
    assert "was not written by" in fold(model, x).left["1"]
    assert np.array_equal(evaluate(model, x), expected)


def test_batch_statistics_in_eval_are_left_and_not_moved() -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4, use_global_stats=False)))
    before = state_of(model)
    report = fold(model, example(2, 3, 6, 6))
    assert "by the batch in eval() too" in report.left["1"]
    assert all(np.array_equal(value, before[name]) for name, value in state_of(model).items())


def test_ours_uses_running_statistics_in_eval_whatever_use_global_stats_says() -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1), fw.BatchNorm2D(4, use_global_stats=False)))
    assert [pair.norm for pair in fold(model, example(2, 3, 6, 6)).folded] == ["1"]


def test_other_norms_and_layers_with_a_forward_of_their_own_are_left() -> None:
    class Standardized(nn.Conv2D):
        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)

    model = nn.Sequential(
        nn.Conv2D(3, 4, 1), nn.GroupNorm(2, 4), Standardized(4, 4, 1), nn.BatchNorm2D(4),
        nn.utils.weight_norm(nn.Conv2D(4, 4, 1)), nn.BatchNorm2D(4),
    )  # fmt: skip
    report = fold(randomize(model), example(2, 3, 6, 6))
    assert not report.folded
    assert "each sample by itself" in report.left["1"]
    assert "forward of its own" in report.left["3"]
    assert "weight_norm" in report.left["5"]


def test_shared_weights_are_left() -> None:
    model = nn.Sequential(nn.Conv2D(4, 4, 1), nn.BatchNorm2D(4), nn.Conv2D(4, 4, 1))
    model[2].weight = model[0].weight
    assert "shares a parameter with '2'" in fold(randomize(model), example(2, 4, 6, 6)).left["1"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_bad_running_variance_is_an_error_and_changes_nothing(value: float) -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4)))
    model[1]._variance[2] = value
    before = state_of(model)
    with pytest.raises(StatisticsError, match=r"running variance of norm layer '1' is .* in channel 2"):
        fold(model, example(2, 3, 6, 6))
    assert all(np.array_equal(item, before[name], equal_nan=True) for name, item in state_of(model).items())
    assert model[1].training


def test_float64_and_several_inputs_by_name() -> None:
    class Net(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4)

        def forward(self, x: paddle.Tensor, scale: paddle.Tensor) -> dict[str, paddle.Tensor]:
            return {"y": self.norm(self.conv(x)) * scale}

    model = randomize(Net().to(dtype="float64"))
    inputs = {"scale": np.float64([2.0]), "x": example(2, 3, 6, 6, dtype="float64")}
    report = fold(model, inputs)
    assert len(report.folded) == 1
    assert report.tolerance == 1e-9
    assert report.max_rel < 1e-14


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (nn.Conv2D(3, 4, 1), "image.png", InputError, "give a paddle.Tensor"),
        (nn.Conv2D(3, 4, 1), [], InputError, "are empty"),
        (nn.Conv2D(3, 4, 1), np.zeros((1, 5, 6, 6), "float32"), SurgeryError, "does not run on the example inputs"),
        (nn.Conv2D(3, 4, 1), np.full((1, 3, 6, 6), np.nan, "float32"), SurgeryError, "yields NaN"),
        (nn.Conv2D(3, 4, 1), np.zeros((0, 3, 6, 6), "float32"), SurgeryError, "returns no values"),
        (object(), np.zeros((1, 3, 6, 6), "float32"), SurgeryError, "not a paddle.nn.Layer"),
    ],
    ids=["string", "nothing", "channels", "nan", "no samples", "no layer"],
)
def test_bad_arguments(model: Any, inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        fold(model, inputs)
    assert "\n" not in str(caught.value)


def test_a_captured_model_is_refused() -> None:
    model = paddle.jit.to_static(nn.Sequential(nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4)))
    with pytest.raises(SurgeryError, match="to_static"):
        fold(model, example(2, 3, 6, 6))


def test_the_report_reads_well_and_is_ready_for_json() -> None:
    model = randomize(Wired(UNFOLDABLE["relu between"][0]))
    report = fold(model, example(2, 4, 6, 6))
    assert str(report).splitlines()[0].startswith("1 norm layers folded, 1 left; outputs moved by at most ")
    record = report.as_dict()
    assert record["folded"] == [{"conv": "conv2", "norm": "norm2"}]
    assert record["left"][0]["norm"] == "norm"
    report.undo()
    report.undo()
    assert isinstance(model.norm2, nn.BatchNorm2D)
