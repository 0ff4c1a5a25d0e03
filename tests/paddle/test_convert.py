"""Conversion in place: the same object, the same parameters, hooks and outputs; and the way back."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from norm_cases import assert_close, randomise, tensor_of

import flatwater.paddle as fw
import flatwater.paddle.nn as fnn
from flatwater.errors import SurgeryError


def make_model() -> paddle.nn.Layer:
    paddle.seed(0)
    model = paddle.vision.models.resnet18(num_classes=7)
    randomise(model)
    return model


def test_a_converted_model_is_the_same_model() -> None:
    model = make_model()
    layer = model.layer1[0].bn1
    parameters = [id(parameter) for parameter in model.parameters()]
    calls: list[int] = []
    layer.register_forward_post_hook(lambda *_: calls.append(1))
    layer.weight.stop_gradient = True
    model.eval()
    x = tensor_of(np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype("float32"))
    expected = model(x).numpy()
    report = fw.convert(model)
    assert len(report.changed) == 20
    assert not report.left
    assert model.layer1[0].bn1 is layer
    assert isinstance(layer, fw.BatchNorm2D)
    assert isinstance(layer, paddle.nn.BatchNorm2D)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert layer.weight.stop_gradient
    assert not layer.training
    np.testing.assert_array_equal(model(x).numpy(), expected)
    assert len(calls) == 2


def test_a_converted_model_trains_with_the_kernels_as_it_did() -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 64, 64)).astype("float32")
    results = []
    for convert in (False, True):
        model = make_model()
        if convert:
            fw.convert(model)
            assert fw.backend_of(model.bn1, tensor_of(x)) == "flatwater"
        model.train()
        with pytest.warns(UserWarning, match="track global mean") if not convert else _nothing():
            y = model(tensor_of(x))
        y.square().sum().backward()
        results.append((y.numpy(), model.conv1.weight.grad.numpy(), model.layer4[1].bn2._variance.numpy()))
    # Twenty norms in a row, each over a few dozen values at the end: rounding grows from layer to layer.
    for found, expected in zip(results[1], results[0], strict=True):
        assert_close(found, expected, 2e-3, "after twenty norms")


class _nothing:  # noqa: N801 - a context manager that does nothing
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_revert_gives_stock_layers_back() -> None:
    model = make_model()
    kinds = [type(layer) for layer in model.sublayers()]
    fw.convert(model)
    assert len(fw.revert(model).changed) == 20
    assert [type(layer) for layer in model.sublayers()] == kinds


def test_what_is_left_is_said_with_the_reason() -> None:
    class Mine(paddle.nn.BatchNorm2D):
        pass

    model = paddle.nn.Sequential(Mine(3), paddle.nn.SyncBatchNorm(3), fw.BatchNorm2D(3, act="relu"), fw.BatchNorm2D(3))
    report = fw.convert(model)
    assert not report.changed
    assert "Mine is a subclass, which may do more" in report.left["0"]
    assert "SyncBatchNorm" in report.left["1"]
    back = fw.revert(model)
    assert back.changed == ["3"]
    assert "act='relu' is fused" in back.left["2"]
    with pytest.raises(SurgeryError, match="ndarray"):
        fw.convert(np.zeros(3))


def test_the_published_example_runs_with_only_the_import_changed() -> None:
    nn = fnn

    class ConvBNLayer(nn.Layer):
        def __init__(self, in_channels: int, out_channels: int) -> None:
            super().__init__()
            self.conv = nn.Conv2D(in_channels, out_channels, kernel_size=3, padding=1, bias_attr=False)
            self.bn = nn.BatchNorm(out_channels)
            self.relu = nn.ReLU()

        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            return self.relu(self.bn(self.conv(x)))

    layer = ConvBNLayer(in_channels=3, out_channels=64)
    x = paddle.randn([8, 3, 224, 224])
    y = layer(x)
    assert fw.backend_of(layer.bn, x) == "flatwater"
    assert (list(x.shape), list(y.shape)) == ([8, 3, 224, 224], [8, 64, 224, 224])


def test_nn_is_paddles_but_for_the_norms() -> None:
    assert fnn.Conv2D is paddle.nn.Conv2D
    assert fnn.functional is paddle.nn.functional
    assert fnn.BatchNorm2D is fw.BatchNorm2D
    assert "Linear" in dir(fnn)
    with pytest.raises(AttributeError, match="Conv7D"):
        _ = fnn.Conv7D
