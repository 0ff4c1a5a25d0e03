"""Networks for the shipping tests, and statistics that make folding non-trivial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

import flatwater.paddle as fw

CONV_KINDS: dict[str, tuple[Callable[[], list[nn.Layer]], Sequence[int]]] = {
    "conv1d": (lambda: [nn.Conv1D(4, 6, 3, bias_attr=False), nn.BatchNorm1D(6)], (2, 4, 9)),
    "conv2d": (lambda: [nn.Conv2D(4, 6, 3, bias_attr=False), nn.BatchNorm2D(6)], (2, 4, 7, 8)),
    "conv2d with bias": (lambda: [nn.Conv2D(4, 6, 3, stride=2, padding=1), nn.BatchNorm2D(6)], (2, 4, 7, 8)),
    "conv3d": (lambda: [nn.Conv3D(2, 6, 3, bias_attr=False), nn.BatchNorm3D(6)], (2, 2, 5, 6, 5)),
    "grouped": (lambda: [nn.Conv2D(4, 6, 3, groups=2), nn.BatchNorm2D(6)], (2, 4, 7, 8)),
    "depthwise": (lambda: [nn.Conv2D(4, 8, 3, groups=4, bias_attr=False), nn.BatchNorm2D(8)], (2, 4, 7, 8)),
    "dilated": (lambda: [nn.Conv2D(4, 6, 3, dilation=2, padding="same"), nn.BatchNorm2D(6)], (2, 4, 7, 8)),
    "reflecting": (lambda: [nn.Conv2D(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2D(6)], (2, 4, 7, 8)),
    "channels last": (
        lambda: [nn.Conv2D(4, 6, 3, data_format="NHWC"), nn.BatchNorm2D(6, data_format="NHWC")],
        (2, 7, 8, 4),
    ),
    "any rank": (lambda: [nn.Conv2D(4, 6, 3, bias_attr=False), nn.BatchNorm(6, act="relu")], (2, 4, 7, 8)),
    "sigmoid": (lambda: [nn.Conv2D(4, 6, 3, bias_attr=False), nn.BatchNorm(6, act="sigmoid")], (2, 4, 7, 8)),
    "transposed": (lambda: [nn.Conv2DTranspose(4, 6, 3, stride=2), nn.BatchNorm2D(6)], (2, 4, 5, 6)),
    "transposed, grouped": (lambda: [nn.Conv2DTranspose(4, 6, 3, groups=2), nn.BatchNorm2D(6)], (2, 4, 5, 6)),
    "transposed 1d": (lambda: [nn.Conv1DTranspose(4, 6, 3), nn.BatchNorm1D(6)], (2, 4, 5)),
    "linear": (lambda: [nn.Linear(4, 6), nn.BatchNorm1D(6)], (5, 4)),
    "linear, channels last": (lambda: [nn.Linear(4, 6), nn.BatchNorm1D(6, data_format="NLC")], (2, 5, 4)),
    "no affine": (
        lambda: [nn.Conv2D(4, 6, 3), nn.BatchNorm2D(6, weight_attr=False, bias_attr=False)],
        (2, 4, 7, 8),
    ),
    "synchronised": (lambda: [nn.Conv2D(4, 6, 3), nn.SyncBatchNorm(6)], (2, 4, 7, 8)),
    "ours": (lambda: [fw.ConvBNLayer(4, 6, act="hardswish"), fw.ConvBNLayer(6, 6, groups=3, act=None)], (2, 4, 7, 8)),
}


def randomize(model: nn.Layer, seed: int = 0) -> nn.Layer:
    """Give γ, β and the running statistics of every norm layer the values that training might."""
    generator = np.random.default_rng(seed)
    for layer in model.sublayers(include_self=True):
        if not hasattr(layer, "_variance"):
            continue
        for tensor, values in (
            (layer._mean, generator.normal(0, 0.3, layer._mean.shape)),
            (layer._variance, generator.uniform(0.5, 2, layer._mean.shape)),
            (layer.weight, generator.uniform(0.5, 1.5, layer._mean.shape)),
            (layer.bias, generator.normal(0, 0.3, layer._mean.shape)),
        ):
            if tensor is not None:
                tensor.set_value(values.astype(str(tensor.dtype).removeprefix("paddle.")))
    return model


class ThreeNorms(nn.Layer):
    """A stock batch norm, one of ours, and a group norm, with what comes behind it."""

    def __init__(self, *behind: nn.Layer) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2D(3, 8, 3, padding=1), nn.BatchNorm2D(8))
        self.body = nn.Sequential(nn.Conv2D(8, 8, 3, padding=1), fw.BatchNorm2D(8, act="relu"))
        self.head = nn.Sequential(nn.Conv2D(8, 8, 1), nn.GroupNorm(2, 8), *behind)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.head(self.body(self.stem(x)))


def three_norms(*behind: nn.Layer) -> Any:
    """That network, converted, with the values that training might give it."""
    paddle.seed(3)
    model = ThreeNorms(*behind)
    fw.convert(model)
    return randomize(model)


def example(*shape: int, dtype: str = "float32") -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(7).normal(size=shape).astype(dtype))


def evaluate(model: nn.Layer, x: paddle.Tensor) -> np.ndarray:
    """The output in eval(), with every layer put back into its mode."""
    modes = [(layer, layer.training) for layer in model.sublayers(include_self=True)]
    model.eval()
    with paddle.no_grad():
        y = model(x).numpy()
    for layer, training in modes:
        layer.training = training
    return y


def state_of(model: nn.Layer) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


class Wired(nn.Layer):
    """Two convolutions and norms, wired by a function of the layer and its input."""

    def __init__(self, wiring: Callable[[Any, paddle.Tensor], paddle.Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2D(4, 4, 3, padding=1, bias_attr=False), nn.BatchNorm2D(4)
        self.conv2, self.norm2 = nn.Conv2D(4, 4, 3, padding=1), nn.BatchNorm2D(4)
        self.wiring = wiring

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.wiring(self, x)


def _read_twice(read: Callable[[paddle.Tensor], paddle.Tensor]) -> Callable[[Any, paddle.Tensor], paddle.Tensor]:
    def wiring(net: Any, x: paddle.Tensor) -> paddle.Tensor:
        y = net.conv(x)
        return net.norm2(net.conv2(net.norm(y))) + read(y)

    return wiring


def _in_place(net: Any, x: paddle.Tensor) -> paddle.Tensor:
    y = net.conv(x)
    F.relu_(y)
    return net.norm2(net.conv2(net.norm(y)))


# What stands between conv and norm, and what is said of norm; conv2 and norm2 can always be folded.
UNFOLDABLE: dict[str, tuple[Callable[[Any, paddle.Tensor], paddle.Tensor], str]] = {
    "read by relu": (_read_twice(F.relu), "something besides it"),
    "read by a maximum": (_read_twice(lambda y: y.max()), "something besides it"),
    "read by a residual sum": (_read_twice(lambda y: y), "something besides it"),
    "read in a window": (_read_twice(lambda y: F.max_pool2d(y, 3, 1, 1)), "something besides it"),
    "changed in place": (_in_place, "was not written by"),
    "conv runs twice": (
        lambda net, x: net.norm2(net.conv2(net.conv(F.relu(net.norm(net.conv(x)))))),
        "runs 2 times",
    ),
    "norm runs twice": (
        lambda net, x: net.norm2(net.conv2(net.norm(net.norm(net.conv(x))))),
        "runs 2 times",
    ),
    "relu between": (lambda net, x: net.norm2(net.conv2(net.norm(F.relu(net.conv(x))))), "was not written by"),
    "norm first": (lambda net, x: net.norm2(net.conv2(net.conv(net.norm(x)))), "was not written by"),
    "not reached": (lambda net, x: net.norm2(net.conv2(net.conv(x))), "do not reach it"),
}
