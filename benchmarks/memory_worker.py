"""What a training step does to this process's memory, as Linux counts it; Paddle, stock and with Flatwater's layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import paddle
from paddle import nn

from benchmarks.paddle_worker import Graph, flatwater, stock
from benchmarks.timing import page_faults
from benchmarks.worker import serve
from flatwater.kernels import pool

__all__: list[str] = []

MAKERS: dict[str, Callable[[int, str, str], nn.Layer]] = {"stock": stock, "flatwater": flatwater}


class Scale(nn.Layer):  # type: ignore[misc] # Paddle's annotations are not read
    """What saves nothing for its backward pass."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """Twice x."""
        return x * 2.0


class Residual(nn.Layer):  # type: ignore[misc]
    """A norm between two ways of a block: a neighbour, and what is added, which has a neighbour of its own."""

    def __init__(self, neighbour: nn.Layer, added: nn.Layer, norm: nn.Layer) -> None:
        super().__init__()
        self.neighbour, self.added, self.norm = neighbour, added, norm

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """``norm(neighbour(x), added(x))``."""
        return self.norm(self.neighbour(x), self.added(x))


def peak(shape: list[int], brand: str, neighbours: str, norm: str, blocks: int) -> int:
    """Bytes by which the first training step of norms between neighbours raises resident memory's peak.

    Parameters and what libraries load are there before: a step on one small image has been taken.

    Args:
        shape: (N, C, H, W).
        brand: stock, flatwater.
        neighbours: ``scale``, or ``conv``: 1×1, keeping the channels, so that they need little room of their own.
        norm: its activation, and ``+residual`` where something is added before that.
        blocks: how many times neighbour and norm stand behind each other, before a last neighbour.
    """
    channels = shape[1]

    def neighbour() -> nn.Layer:
        return Scale() if neighbours == "scale" else nn.Conv2D(channels, channels, 1)

    layers: list[nn.Layer] = []
    for _ in range(blocks):
        middle = MAKERS[brand](channels, "NCHW", norm)
        layers += [Residual(neighbour(), neighbour(), middle)] if "+" in norm else [neighbour(), middle]
    model = nn.Sequential(*layers, neighbour())
    _training_step(model, [1, channels, 8, 8])
    x, gradient = _input(shape)
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is resident now
    model(x).backward(gradient)
    return _status("VmHWM") - before


def faults(shape: list[int], layout: str, brand: str, warm: int, steps: int) -> float:
    """Page faults per training step in the steady state, of the graph that :mod:`benchmarks.layers` times.

    Args:
        shape: (N, C, H, W).
        layout: NCHW, NHWC.
        brand: ``bare`` has no norm; its faults are the producer's and the consumer's.
        warm: steps before counting begins.
        steps: steps that are counted.
    """
    middle = None if brand == "bare" else MAKERS[brand](shape[1], layout, "relu")
    graph = Graph(Graph.tensors(shape, layout), middle)
    _steady(graph, warm)
    before = page_faults()
    _steady(graph, steps)
    return (page_faults() - before) / steps


def bounded(shapes: list[list[int]], steps: int) -> dict[str, int]:
    """What the pool holds after steps on tensors of all these shapes, and what the process gets back from it."""
    for shape in shapes:
        _steady(Graph(Graph.tensors(shape, "NCHW"), flatwater(shape[1], "NCHW", "relu")), steps)
    statistics, before = pool.statistics(), _resident()
    trimmed = pool.trim()
    return statistics._asdict() | {"trimmed": trimmed, "resident_fell_by": before - _resident()}


def _steady(graph: Graph, steps: int) -> None:
    for _ in range(steps):
        graph.step()


def _training_step(model: nn.Layer, shape: list[int]) -> None:
    x, gradient = _input(shape)
    model(x).backward(gradient)
    model.clear_gradients()


def _input(shape: list[int]) -> tuple[paddle.Tensor, paddle.Tensor]:
    x, gradient = paddle.ones(shape), paddle.ones(shape)
    x.stop_gradient = False
    return x, gradient


def _resident() -> int:
    return _status("VmRSS")


def _status(field: str) -> int:
    """One of the sizes in ``/proc/self/status``, in bytes."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status says nothing of {field}; this part needs Linux")
    return int(found[1]) * 1024


if __name__ == "__main__":
    serve({"peak": peak, "faults": faults, "bounded": bounded})
