"""Paddle's side of the comparisons, stock and with Flatwater's layers, in a process without PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
from paddle import nn

import flatwater.paddle as fw
from benchmarks.hard_data import HardCase, read_case, write_results
from benchmarks.shapes import groups, memory_shape
from benchmarks.timing import settle, timer
from benchmarks.worker import serve
from flatwater import kernels

__all__ = ["Graph", "flatwater", "stock"]

ACTIVATIONS: dict[str, Callable[[], nn.Layer]] = {"none": nn.Identity, "relu": nn.ReLU, "hardswish": nn.Hardswish}


Tensors = tuple[paddle.Tensor, paddle.Tensor | None, paddle.Tensor]


class Graph:
    """A producer, perhaps a norm and activation, and a consumer; forward and backward.

    A residual has a producer of its own, which without a norm gets its gradient from outside.

    Args:
        tensors: the input, the residual or None, and the gradient of the output, which several graphs may share.
        middle: the norm; None for the graph without one.
    """

    def __init__(self, tensors: Tensors, middle: nn.Layer | None) -> None:
        self.inputs, self.gradient = [x for x in tensors[:2] if x is not None], tensors[2]
        self.middle = middle
        self.leaves = [*self.inputs, *(() if middle is None else middle.parameters())]

    @staticmethod
    def tensors(shape: list[int], layout: str, *, residual: bool = False) -> Tensors:
        """Random ones of this shape, (N, C, H, W) whatever the layout."""
        samples, channels, height, width = shape
        size = memory_shape((samples, channels, height, width), layout)
        x, added = (paddle.randn(size) if wanted else None for wanted in (True, residual))
        for leaf in (x, added):
            if leaf is not None:
                leaf.stop_gradient = False
        return x, added, paddle.randn(size)

    def step(self) -> None:
        """One training step's share: both passes, gradients dropped as an optimizer's ``clear_grad`` drops them."""
        x, *residuals = (leaf * 2.0 for leaf in self.inputs)
        ends = [x * 0.5, *residuals] if self.middle is None else [self.middle(x, *residuals) * 0.5]
        paddle.autograd.backward(ends, [self.gradient] * len(ends))
        for leaf in self.leaves:
            leaf.clear_gradient(False)  # Paddle ignores set_to_zero given by name


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
            added = Graph.tensors(shape, layout, residual=any(norm.endswith("+residual") for norm in norms))
            plain = added[0], None, added[2]
            for norm in norms:
                if norm != "instance" or layout == "NCHW":
                    bare, tensors = ("bare+residual", added) if norm.endswith("+residual") else ("bare", plain)
                    self._graphs[f"{layout} {bare}"] = Graph(tensors, None)
                    for brand, make in (("stock", stock), ("flatwater", flatwater)):
                        self._graphs[f"{layout} {norm} {brand}"] = Graph(tensors, make(shape[1], layout, norm))
        settle([graph.step for graph in self._graphs.values()])
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


def describe() -> dict[str, Any]:
    """What computes here."""
    return {"threads": kernels.threads(), "isa": kernels.isa()}


def batch_norm(brand: str, source: str, target: str) -> None:
    """One training step of batch norm on a case's tensors; its results are written to ``target``."""
    case: HardCase = read_case(source)
    make = {"stock": nn.BatchNorm2D, "flatwater": fw.BatchNorm2D}[brand]
    norm = make(case.x.shape[1], epsilon=case.epsilon, momentum=0.9, data_format=case.layout)
    norm.weight.set_value(case.weight)
    norm.bias.set_value(case.bias)
    norm._variance.set_value(paddle.zeros_like(norm._variance))
    last = case.layout == "NHWC"
    x, dy = (np.ascontiguousarray(np.moveaxis(array, 1, -1) if last else array) for array in (case.x, case.dy))
    given = paddle.to_tensor(x, stop_gradient=False)
    y = norm(given)
    y.backward(paddle.to_tensor(dy))
    y, dx = (np.moveaxis(t.numpy(), -1, 1) if last else t.numpy() for t in (y, given.grad))
    results = {"dγ": norm.weight.grad, "dβ": norm.bias.grad, "running variance": norm._variance}
    write_results(target, {"y": y, "dx": dx} | {name: tensor.numpy() for name, tensor in results.items()})


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
