"""Paddle's side of the comparisons, stock and with Flatwater's layers, in a process without PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
from paddle import nn

import flatwater.paddle as fw
from benchmarks.hard_data import HardCase, read_case, write_results
from benchmarks.shapes import memory_shape
from benchmarks.timing import timer
from benchmarks.worker import serve
from flatwater import kernels

__all__ = ["Graph", "flatwater", "stock"]

ACTIVATIONS: dict[str, Callable[[], nn.Layer]] = {"none": nn.Identity, "relu": nn.ReLU, "hardswish": nn.Hardswish}


class Graph:
    """A producer, perhaps a norm and activation, and a consumer; forward and backward.

    A residual has a producer of its own, which without a norm gets its gradient from outside.

    Args:
        shape: (N, C, H, W).
        layout: NCHW, NHWC.
        middle: the norm; None for the graph without one.
        residual: whether there is one.
    """

    def __init__(self, shape: list[int], layout: str, middle: nn.Layer | None, *, residual: bool = False) -> None:
        samples, channels, height, width = shape
        size = memory_shape((samples, channels, height, width), layout)
        self.middle = middle
        self.inputs, self.gradient = [paddle.randn(size) for _ in range(1 + residual)], paddle.randn(size)
        for x in self.inputs:
            x.stop_gradient = False
        self.leaves = [*self.inputs, *(() if middle is None else middle.parameters())]

    def step(self) -> None:
        """One training step's share: both passes, gradients dropped as an optimizer's ``clear_grad`` drops them."""
        x, *residuals = (leaf * 2.0 for leaf in self.inputs)
        ends = [x * 0.5, *residuals] if self.middle is None else [self.middle(x, *residuals) * 0.5]
        paddle.autograd.backward(ends, [self.gradient] * len(ends))
        for leaf in self.leaves:
            leaf.clear_gradient(set_to_zero=False)


class Added(nn.Layer):  # type: ignore[misc] # Paddle's annotations are not read
    """Paddle's batch norm, the addition of a residual, and an activation, as its ResNet has them."""

    def __init__(self, norm: nn.Layer, activation: nn.Layer) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: paddle.Tensor, residual: paddle.Tensor) -> paddle.Tensor:
        """``act(norm(x) + residual)``."""
        return self.activation(self.norm(x) + residual)


class Contenders:
    """The graphs of the shape that is being measured, by name."""

    def __init__(self) -> None:
        self._graphs: dict[str, Graph] = {}

    def prepare(self, shape: list[int], layouts: list[str], norms: list[str]) -> list[str]:
        """Make the graphs for this shape; returns their names.

        Args:
            shape: (N, C, H, W), whatever the layout.
            layouts: NCHW, NHWC.
            norms: activations behind batch norm, also with ``+residual``, or ``group`` and ``instance`` norm alone.

        Returns:
            ``LAYOUT bare``, with ``+residual`` where a norm has one, ``LAYOUT NORM stock`` and ``LAYOUT NORM
            flatwater``; instance norm in NCHW only, for Paddle's knows no other.
        """
        self._graphs = {}
        for layout in layouts:
            for norm in norms:
                if norm != "instance" or layout == "NCHW":
                    residual = norm.endswith("+residual")
                    bare = f"{layout} bare+residual" if residual else f"{layout} bare"
                    if bare not in self._graphs:
                        self._graphs[bare] = Graph(shape, layout, None, residual=residual)
                    for brand, make in (("stock", stock), ("flatwater", flatwater)):
                        graph = Graph(shape, layout, make(shape[1], layout, norm), residual=residual)
                        self._graphs[f"{layout} {norm} {brand}"] = graph
        return list(self._graphs)

    def time(self, contender: str, repeats: int) -> float:
        """Milliseconds of one step."""
        return timer(self._graphs[contender].step)(repeats)


def stock(channels: int, layout: str, norm: str) -> nn.Layer:
    """Paddle's own layer, and its activation."""
    if norm == "group":
        return nn.GroupNorm(groups(channels), channels, data_format=layout)
    if norm == "instance":
        return nn.InstanceNorm2D(channels, data_format=layout)
    activation, _, residual = norm.partition("+")
    layer = nn.BatchNorm2D(channels, data_format=layout)
    if residual:
        return Added(layer, ACTIVATIONS[activation]())
    return layer if norm == "none" else nn.Sequential(layer, ACTIVATIONS[activation]())


def flatwater(channels: int, layout: str, norm: str) -> nn.Layer:
    """Flatwater's layer, with the activation inside."""
    if norm == "group":
        return fw.GroupNorm(groups(channels), channels, data_format=layout)
    if norm == "instance":
        return fw.InstanceNorm2D(channels, data_format=layout)
    return fw.BatchNorm2D(channels, data_format=layout, act=norm.partition("+")[0])


def groups(channels: int) -> int:
    """32, as in the paper, or 8 where 32 does not divide the channels."""
    return 8 if channels % 32 else 32


def describe() -> dict[str, Any]:
    """What computes here."""
    return {"threads": kernels.threads(), "isa": kernels.isa()}


def batch_norm(brand: str, source: str, target: str) -> None:
    """One training step of batch norm on a case's tensors; its results are written to ``target``."""
    case: HardCase = read_case(source)
    make = {"stock": nn.BatchNorm2D, "flatwater": fw.BatchNorm2D}[brand]
    norm = make(case.x.shape[1], epsilon=case.epsilon, momentum=0.9)
    norm.weight.set_value(case.weight)
    norm.bias.set_value(case.bias)
    norm._variance.set_value(paddle.zeros_like(norm._variance))
    x = paddle.to_tensor(case.x, stop_gradient=False)
    y = norm(x)
    y.backward(paddle.to_tensor(case.dy))
    results = {"y": y, "dx": x.grad, "dγ": norm.weight.grad, "dβ": norm.bias.grad, "running variance": norm._variance}
    write_results(target, {name: tensor.numpy() for name, tensor in results.items()})


if __name__ == "__main__":
    contenders = Contenders()
    serve(
        {
            "describe": describe,
            "prepare": contenders.prepare,
            "time": contenders.time,
            "batch_norm": batch_norm,
        }
    )
