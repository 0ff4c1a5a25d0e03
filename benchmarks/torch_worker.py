"""PyTorch's side of the comparison: the graphs of :mod:`benchmarks.layers`, in a process without Paddle."""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from typing import Any

import torch
from torch import nn

from benchmarks.hard_data import HardCase, read_case, write_results
from benchmarks.timing import settle, timer
from benchmarks.worker import serve

__all__: list[str] = []

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "hardswish": nn.Hardswish,
}

LAYOUTS = ("contiguous", "channels_last", "onednn")

NOT_IN_ONEDNN = ("hardswish",)
"""Activations that PyTorch's oneDNN tensors lack."""


class Graph:
    """A producer, perhaps a norm and activation, and a consumer; forward and backward. As in Paddle's worker."""

    def __init__(self, tensors: list[torch.Tensor], middle: nn.Module | None) -> None:
        *self.inputs, self.gradient = tensors
        self.middle = middle

    @classmethod
    def tensors(cls, shape: list[int], layout: str) -> list[torch.Tensor]:
        """The input, the residual, and the gradient of the output."""
        x, added, gradient = (cls._as(layout, torch.randn(shape)) for _ in range(3))
        return [x.requires_grad_(), added.requires_grad_(), gradient]

    def step(self) -> None:
        """One training step's share: both passes, gradients dropped as an optimizer's ``zero_grad`` drops them."""
        x, *residuals = (leaf * 2.0 for leaf in self.inputs)
        ends = [x * 0.5, *residuals] if self.middle is None else [self.middle(x, *residuals) * 0.5]
        torch.autograd.backward(ends, [self.gradient] * len(ends))
        for leaf in self.inputs:
            leaf.grad = None
        if self.middle is not None:
            self.middle.zero_grad()

    @staticmethod
    def _as(layout: str, tensor: torch.Tensor) -> torch.Tensor:
        if layout == "onednn":
            return tensor.to_mkldnn()
        return tensor.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else tensor


class Added(nn.Module):
    """Batch norm, the addition of a residual, and an activation."""

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """``act(norm(x) + residual)``, the sum in place, as torchvision's ResNet has it."""
        y: torch.Tensor = self.norm(x)
        y += residual
        out: torch.Tensor = self.activation(y)
        return out


class Contenders:
    """The graphs of the shape that is being measured, by name."""

    def __init__(self) -> None:
        self._graphs: dict[str, Graph] = {}

    def prepare(self, shape: list[int], norms: list[str]) -> list[str]:
        """Make the graphs for this shape; returns their names: ``LAYOUT bare`` and ``LAYOUT NORM``.

        Args:
            shape: (N, C, H, W).
            norms: activations behind batch norm; each, and ``bare``, also with ``+residual``.
        """
        self._graphs = {}
        for layout in LAYOUTS:
            x, added, gradient = Graph.tensors(shape, layout)
            for norm in norms:
                activation, _, residual = norm.partition("+")
                if layout != "onednn" or activation not in NOT_IN_ONEDNN:
                    tensors = [x, added, gradient] if residual else [x, gradient]
                    self._graphs[f"{layout} bare+residual" if residual else f"{layout} bare"] = Graph(tensors, None)
                    self._graphs[f"{layout} {norm}"] = Graph(tensors, _norm(shape[1], norm))
        settle([graph.step for graph in self._graphs.values()])
        return list(self._graphs)

    def time(self, contender: str, repeats: int) -> float:
        """Milliseconds of one step."""
        return timer(self._graphs[contender].step)(repeats)


def describe() -> dict[str, Any]:
    """What computes here."""
    return {
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
        "ipex": util.find_spec("intel_extension_for_pytorch") is not None,
    }


def batch_norm(source: str, target: str) -> None:
    """One training step of batch norm on a case's tensors; its results are written to ``target``."""
    case: HardCase = read_case(source)
    norm = nn.BatchNorm2d(case.x.shape[1], eps=case.epsilon, momentum=0.1)
    assert norm.running_var is not None
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(case.weight))
        norm.bias.copy_(torch.from_numpy(case.bias))
        norm.running_var.zero_()
    form = torch.channels_last if case.layout == "NHWC" else torch.contiguous_format
    x = torch.from_numpy(case.x).contiguous(memory_format=form).requires_grad_()
    y = norm(x)
    y.backward(torch.from_numpy(case.dy).contiguous(memory_format=form))
    results: dict[str, Any] = {"y": y.detach(), "dx": x.grad, "dγ": norm.weight.grad, "dβ": norm.bias.grad}
    results["running variance"] = norm.running_var
    write_results(target, {name: tensor.numpy() for name, tensor in results.items()})


def _norm(channels: int, norm: str) -> nn.Module:
    activation, _, residual = norm.partition("+")
    layer = nn.BatchNorm2d(channels)
    if residual:
        return Added(layer, ACTIVATIONS[activation]())
    return layer if norm == "none" else nn.Sequential(layer, ACTIVATIONS[activation]())


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
