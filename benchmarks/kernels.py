"""How fast batch norm with a fused activation is, forward and backward, beside two yardsticks.

The floor
    Such a step must read x and write y, then read x and dy and write dx: five passes over the tensor,
    so two and a half copies of it. The copy is timed in the same rounds.
Stock Paddle
    ``batch_norm`` and the activation inside a graph, between an operator that produces their input and
    one that consumes their output, less the time of that graph without them. Flatwater's layer is
    timed in the same place, so that what autograd and allocation cost is in the figure.

Each round times everything once, in an order that rotates, so that what disturbs the machine disturbs all;
every figure is the median over rounds, every ratio the median of the rounds' ratios, with quartiles.

    python benchmarks/kernels.py --quick
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from flatwater import host, kernels
from flatwater.spec import Activation

SHAPES = {
    "8x64x224x224": (8, 64, 224, 224),
    "32x256x56x56": (32, 256, 56, 56),
    "32x128x28x28": (32, 128, 28, 28),
    "32x256x14x14": (32, 256, 14, 14),
    "32x512x7x7": (32, 512, 7, 7),
    "64x96x12x80": (64, 96, 12, 80),
}
LAYOUTS = ("NCHW", "NHWC")
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu")
PASSES_PER_COPY = 2.5

# Seconds: long enough that one interruption is not all there is.
SHORTEST_SAMPLE = 0.02

# Processors that others may keep busy before the figures say more about them than about the kernels.
QUIET = 0.1

Contender = Callable[[], object]


@dataclass(frozen=True)
class Quartiles:
    """Of one number per round."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: np.ndarray) -> Quartiles:
        return cls(*(float(value) for value in np.percentile(values, [25, 50, 75])))

    def __str__(self) -> str:
        return f"{self.median:.3g}\n[dim]{self.lower:.3g}–{self.upper:.3g}[/]"


@dataclass(frozen=True)
class Row:
    """One shape, layout and activation; times in milliseconds."""

    shape: str
    layout: str
    activation: str
    floor: Quartiles
    kernel: Quartiles
    kernel_to_floor: Quartiles
    stock: Quartiles
    layer: Quartiles
    stock_to_layer: Quartiles


# --- Contenders --------------------------------------------------------------------------------------


class Kernel:
    """The two kernel calls of one training step, on memory that is already there."""

    def __init__(self, shape: tuple[int, ...], layout: str, activation: Activation) -> None:
        channels, last = shape[1], layout == "NHWC"
        generator = np.random.default_rng(0)
        self.x, self.dy = generator.standard_normal((2, *memory_shape(shape, layout)), np.float32)
        self.y, self.dx = np.zeros_like(self.x), np.zeros_like(self.x)
        self.weight, self.bias = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        self.statistics = {name: np.zeros(channels) for name in ("mean", "m2", "inv_std")}
        self.sums = {name: np.zeros(channels) for name in ("sum_dz", "sum_dz_xhat")}

        as_buffer = partial(kernels.Buffer.from_numpy, channels_last=last)
        self.buffers = [as_buffer(array) for array in (self.x, self.y, self.dy, self.dx)]
        self.given: dict[str, Any] = {
            "weight": kernels.Vector.from_numpy(self.weight),
            "bias": kernels.Vector.from_numpy(self.bias),
            "activation": activation,
        }

    def step(self) -> None:
        x, y, dy, dx = self.buffers
        kernels.batch_norm_forward(x, y, epsilon=1e-5, **self.statistics, **self.given)
        known = {"mean": self.statistics["mean"], "inv_std": self.statistics["inv_std"]}
        kernels.batch_norm_backward(dy, x, dx, None, **known, **self.sums, **self.given)


class Graph:
    """A producer, perhaps a normalization and activation, and a consumer; forward and backward."""

    def __init__(self, shape: tuple[int, ...], layout: str, middle: Any = None) -> None:
        import paddle

        size = memory_shape(shape, layout)
        self.middle = middle or paddle.nn.Identity()
        self.x, self.gradient = paddle.randn(size), paddle.randn(size)
        self.x.stop_gradient = False
        self.leaves = [self.x, *self.middle.parameters()]

    def step(self) -> None:
        out = self.middle(self.x * 2.0) * 0.5
        out.backward(self.gradient)
        for leaf in self.leaves:
            leaf.clear_gradient(set_to_zero=False)


def stock(channels: int, layout: str, activation: Activation) -> Any:
    """Paddle's own layer, in training, and its activation."""
    from paddle import nn

    norm = nn.BatchNorm2D(channels, data_format=layout)
    return norm if activation == "none" else nn.Sequential(norm, nn.ReLU())


def layer(channels: int, layout: str, activation: Activation) -> Any:
    """Flatwater's layer, in training, with the activation inside."""
    import flatwater.paddle as fw

    return fw.BatchNorm2D(channels, data_format=layout, act=activation)


class Copy:
    """A copy of one tensor into warm memory: in one piece, or a piece for each thread."""

    def __init__(self, kernel: Kernel, pool: ThreadPoolExecutor) -> None:
        self.source, self.target, self.pool = kernel.x.reshape(-1), kernel.y.reshape(-1), pool
        pieces = kernels.threads()
        self.sources, self.targets = np.array_split(self.source, pieces), np.array_split(self.target, pieces)

    def whole(self) -> None:
        np.copyto(self.target, self.source)

    def pieces(self) -> None:
        for _ in self.pool.map(np.copyto, self.targets, self.sources):
            pass


def memory_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    samples, channels, height, width = shape
    return (samples, height, width, channels) if layout == "NHWC" else shape


# --- Timing ------------------------------------------------------------------------------------------


def milliseconds(contender: Contender, repeats: int) -> float:
    contender()  # whatever ran before has the caches, and this one's threads may be asleep
    start = time.perf_counter()
    for _ in range(repeats):
        contender()
    return (time.perf_counter() - start) / repeats * 1e3


def compare(contenders: dict[str, Contender], rounds: int) -> dict[str, np.ndarray]:
    """One time per round and contender, in rounds that begin with another contender each."""
    repeats = {}
    for name, contender in contenders.items():
        contender()  # allocations, pages
        repeats[name] = max(1, round(SHORTEST_SAMPLE * 1e3 / milliseconds(contender, 3)))
    names, times = list(contenders), {name: np.zeros(rounds) for name in contenders}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            times[name][index] = milliseconds(contenders[name], repeats[name])
    return times


def measure(name: str, layout: str, activation: Activation, rounds: int, pool: ThreadPoolExecutor) -> Row:
    shape = SHAPES[name]
    kernel = Kernel(shape, layout, activation)
    copy = Copy(kernel, pool)
    times = compare(
        {
            "copy": copy.whole,
            "copy in pieces": copy.pieces,
            "kernel": kernel.step,
            "bare": Graph(shape, layout).step,
            "stock": Graph(shape, layout, stock(shape[1], layout, activation)).step,
            "layer": Graph(shape, layout, layer(shape[1], layout, activation)).step,
        },
        rounds,
    )
    floor = PASSES_PER_COPY * np.minimum(times["copy"], times["copy in pieces"])
    stock_time, layer_time = times["stock"] - times["bare"], times["layer"] - times["bare"]
    return Row(
        name,
        layout,
        activation,
        floor=Quartiles.of(floor),
        kernel=Quartiles.of(times["kernel"]),
        kernel_to_floor=Quartiles.of(times["kernel"] / floor),
        stock=Quartiles.of(stock_time),
        layer=Quartiles.of(layer_time),
        stock_to_layer=Quartiles.of(stock_time / layer_time),
    )


class Others:
    """How many processors everything else on this machine has kept busy since this was made (Linux; else 0)."""

    def __init__(self) -> None:
        self.began, self.busy, self.own = time.perf_counter(), self._busy(), time.process_time()

    def processors(self) -> float:
        others = (self._busy() - self.busy) - (time.process_time() - self.own)
        return max(0.0, others / (time.perf_counter() - self.began))

    @staticmethod
    def _busy() -> float:
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0
        user, nice, system, *_ = map(int, stat.read_text(encoding="ascii").split()[1:4])
        return float((user + nice + system) / os.sysconf("SC_CLK_TCK"))


# --- The command -------------------------------------------------------------------------------------


def table_of(rows: list[Row], others: float) -> Table:
    title = f"Batch norm + activation, forward and backward, float32, {kernels.threads()} threads, {kernels.isa()}"
    caption = f"medians in ms, quartiles below them; other processes kept {others:.1f} processors busy"
    if others > QUIET:
        caption += "\n[bold]a team of threads waits for its slowest: measure again when the machine is quiet[/]"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    table.add_column("case", no_wrap=True, min_width=18)
    for heading in ("floor", "kernel", "kernel\n/ floor", "stock\nPaddle", "layer", "stock\n/ layer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures = (row.floor, row.kernel, row.kernel_to_floor, row.stock, row.layer, row.stock_to_layer)
        table.add_row(f"{row.shape}\n{row.layout} {row.activation}", *map(str, figures))
    return table


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the batch norm kernels against memory and stock Paddle.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and only the activation relu")
    parser.add_argument("--rounds", type=int, help="rounds for each row (default 15, quick 5)")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="only this shape; may be repeated")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="only this layout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there as well")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least one round is needed")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    if host.missing(os.environ):  # read when a process starts, so it has to start again
        host.launch([sys.executable, *sys.argv])

    warnings.filterwarnings("ignore", "No ccache found")  # Paddle, where it is imported
    warnings.filterwarnings("ignore", "When training, we now always track")  # Paddle's layer, in every step
    console, rows = Console(width=max(96, Console().width)), []
    others = Others()
    rounds = options.rounds or (5 if options.quick else 15)
    activations = ACTIVATIONS[-1:] if options.quick else ACTIVATIONS
    with ThreadPoolExecutor(kernels.threads()) as pool, console.status("measuring") as status:
        for name in options.shape or SHAPES:
            for layout in options.layout or LAYOUTS:
                for activation in activations:
                    status.update(f"measuring {name} {layout} {activation}")
                    rows.append(measure(name, layout, activation, rounds, pool))
    console.print(table_of(rows, others.processors()))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
