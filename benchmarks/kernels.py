"""The kernels alone, forward and backward, beside the time that moving the tensors' bytes takes.

The floor counts passes over a tensor: forward reads x and writes y; backward reads x and dy and writes dx. Those are
five, and a copy, which reads and writes, is two. A residual is read forward and its gradient written backward; with an
activation behind them it is read backward too, for what the activation saw. So:

=====================  =======  ======
between                passes   copies
=====================  =======  ======
no residual            5        2.5
residual, none         7        3.5
residual, activation   8        4.0
=====================  =======  ======

A copy is the fastest of x into y and dy into dx, in one ``memcpy`` and in one per thread, timed in the same rounds:
how two tensors' pages lie to each other can make a copy slower by half.

Two tensors may fit a cache that four do not, and then the floor is one of the cache and the step one of memory. So
where there is no residual, the passes themselves are timed too, as *streaming*, over the step's own four tensors from
end to end: channels-first y from x, then dx from x and dy. Channels-last every channel is strewn over the whole tensor,
which has to be read to its end for batch norm's statistics before anything can be written; so there x is read before y
is written, and x and dy before dx is: eight passes, of which the caches may take some. Group and instance norm have
their statistics within a sample, and the floor for their only yardstick there. The loops are those that normalize
with known statistics, and NumPy's in one piece for each thread; the faster ones count.

All memory is warm and begins at a multiple of 64 bytes, as a framework's tensors do; NumPy promises 16, off which no
kernel can stream its stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from benchmarks.round_trip import round_trip
from benchmarks.shapes import LAYOUTS, Case, Shape, groups, memory_shape
from benchmarks.timing import Others, Quartiles, Times, geometric_mean, rounds, timer
from flatwater import kernels
from flatwater.spec import Activation

__all__ = ["GROUPED", "LIMITS", "Row", "Summary", "aligned", "copies", "measure", "summarize"]

ALIGNMENT = 64

LIMITS = {"large": 1.25, "small": 2.0}
"""Of kernel / floor, for batch norm + ReLU, by the size of the tensor."""

GROUPED: dict[str, Callable[[int], int]] = {"group": groups, "instance": lambda channels: channels}
"""How many groups the norms of samples have."""

HALF_LIMIT = 0.6
"""Of bfloat16 / float32, on large tensors."""


@dataclass(frozen=True)
class Row:
    """One tensor, layout, activation and residual; times in milliseconds."""

    shape: str
    models: tuple[str, ...]
    size: str
    megabytes: float
    layout: str
    norm: str
    """The activation behind batch norm, or ``"group"`` or ``"instance"``."""
    residual: bool
    dtype: str
    copies: float
    floor: Quartiles
    kernel: Quartiles
    ratio: Quartiles
    """kernel / floor; for bfloat16, of the float32 kernel's time instead of the floor."""
    streaming: Quartiles | None
    """kernel / the passes over the same tensors; None with a residual, for bfloat16, and for norms of other passes."""


@dataclass(frozen=True)
class Summary:
    """What all tensors of one size and layout have in common."""

    size: str
    layout: str
    dtype: str
    what: str
    tensors: int
    geometric_mean: float
    worst: float
    worst_shape: str
    limit: float | None
    streaming_mean: float | None
    streaming_worst: float | None

    @property
    def holds(self) -> bool | None:
        """Whether the worst is within the limit; None where none is set."""
        return None if self.limit is None else self.worst <= self.limit


def copies(norm: str, *, residual: bool) -> float:
    """How many copies of the tensor move as many bytes as one forward and backward pass must."""
    passes = 5 if not residual else 7 if norm == "none" else 8
    return passes / 2


def aligned(shape: Sequence[int], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """An array of zeros whose first byte lies at a multiple of :data:`ALIGNMENT`; its pages are there."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -kernels.Buffer.from_numpy(memory.reshape(1, -1)).pointer % ALIGNMENT
    memory = memory[start : start + nbytes]
    memory.fill(0)
    return memory.view(dtype).reshape(shape)


class Tensors:
    """What a norm reads and writes in one training step, in one layout and dtype."""

    def __init__(self, shape: Shape, layout: str, dtype: str = "float32") -> None:
        channels, size = shape[1], memory_shape(shape, layout)
        stored = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
        names = ("x", "y", "dy", "dx", "residual", "dresidual")
        self.arrays = {name: aligned(size, stored) for name in names}
        generator = np.random.default_rng(0)
        for name in ("x", "dy", "residual"):
            values = generator.standard_normal(size, np.float32)
            # The upper half of a float32 is a bfloat16, rounded towards 0.
            self.arrays[name][...] = values.view(np.uint32) >> 16 if dtype == "bfloat16" else values
        self._last = layout == "NHWC"
        self._buffers = {
            name: kernels.Buffer.from_numpy(array, channels_last=self._last, dtype=dtype)
            for name, array in self.arrays.items()
        }
        self._parameters = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        self._mean, self._m2, self._inv_std = np.zeros((3, shape[0] * channels))  # instance norm has so many
        self._sum_dz, self._sum_dz_xhat = np.zeros((2, channels))

    def group_step(self, groups: int) -> Callable[[], None]:
        """One training step of group norm: the two kernel calls."""
        at, weight, bias = self._buffers, *map(kernels.Vector.from_numpy, self._parameters)
        sets = at["x"].shape[0] * groups
        mean, m2, inv_std = self._mean[:sets], self._m2[:sets], self._inv_std[:sets]
        given: dict[str, Any] = {"groups": groups, "weight": weight, "bias": bias, "mean": mean, "inv_std": inv_std}
        sums: dict[str, Any] = {"sum_dz": self._sum_dz, "sum_dz_xhat": self._sum_dz_xhat}

        def both() -> None:
            kernels.group_norm_forward(at["x"], at["y"], m2=m2, epsilon=1e-5, **given)
            kernels.group_norm_backward(at["dy"], at["x"], at["dx"], None, **sums, **given)

        return both

    def step(self, activation: Activation, *, residual: bool) -> Callable[[], None]:
        """One training step of batch norm: the two kernel calls."""
        at, weight, bias = self._buffers, *map(kernels.Vector.from_numpy, self._parameters)
        given: dict[str, Any] = {"weight": weight, "bias": bias, "activation": activation}
        given["residual"] = at["residual"] if residual else None
        dresidual = at["dresidual"] if residual else None
        mean, m2, inv_std = (array[: at["x"].shape[1]] for array in (self._mean, self._m2, self._inv_std))
        known: dict[str, Any] = {"mean": mean, "inv_std": inv_std}
        sums: dict[str, Any] = {"sum_dz": self._sum_dz, "sum_dz_xhat": self._sum_dz_xhat}

        def both() -> None:
            kernels.batch_norm_forward(at["x"], at["y"], m2=m2, epsilon=1e-5, **known, **given)
            kernels.batch_norm_backward(at["dy"], at["x"], at["dx"], dresidual, **known, **sums, **given)

        return both

    def copies(self, threads: ThreadPoolExecutor) -> dict[str, Callable[[], None]]:
        """Ways to copy a tensor: between two pairs of them, in one piece and in a piece for each thread."""
        found: dict[str, Callable[[], None]] = {}
        for source, target in (("x", "y"), ("dy", "dx")):
            whole = self.arrays[target], self.arrays[source]
            pieces = [np.array_split(array.reshape(-1), kernels.threads()) for array in whole]
            found[f"copy {source}"] = partial(np.copyto, *whole)
            found[f"copy {source} in pieces"] = partial(_copy_pieces, threads, *pieces)
        return found

    def streaming(self, threads: ThreadPoolExecutor) -> dict[str, Callable[[], None]]:
        """Ways to write y from x, and dx from x and dy, from end to end; channels-last after reading them before."""
        names = "x", "y", "dy", "dx"
        whole = [self.arrays[name].reshape(-1) for name in names]
        pieces = [np.array_split(array, kernels.threads()) for array in whole]
        # As rows of so many channels that no row has a rest, whatever the tensor's own channels are.
        channels = math.gcd(whole[0].size, 64)
        x, y, dy, dx = (
            kernels.Buffer.from_numpy(array.reshape(-1, channels, 1), channels_last=False) for array in whole
        )
        known = {name: np.ones(channels) for name in ("mean", "inv_std")}
        sums = {name: np.zeros(channels) for name in ("sum_dz", "sum_dz_xhat")}
        found = {name: np.zeros(channels) for name in ("mean", "m2")}

        def loops() -> None:
            if self._last:
                kernels.batch_statistics(x, **found)
            kernels.batch_normalize(x, y, **known)
            if self._last:
                kernels.batch_gradient_sums(dy, x, **known, **sums)
            kernels.batch_input_gradient(dy, x, dx, None, count=x.shape[0], **known, **sums)

        def in_pieces() -> None:
            if self._last:
                _finish(threads.map(np.add.reduce, pieces[0]))
            _finish(threads.map(np.copyto, pieces[1], pieces[0]))
            if self._last:
                _finish(threads.map(np.dot, pieces[0], pieces[2]))
            _finish(threads.map(_add, pieces[0], pieces[2], pieces[3]))

        return {"streaming": loops, "streaming NumPy": in_pieces}


def _add(x: npt.NDArray[Any], dy: npt.NDArray[Any], dx: npt.NDArray[Any]) -> None:
    np.add(x, dy, out=dx)


def _finish(running: Iterable[None]) -> None:
    for _ in running:
        pass


def _copy_pieces(threads: ThreadPoolExecutor, targets: list[npt.NDArray[Any]], sources: list[npt.NDArray[Any]]) -> None:
    _finish(threads.map(np.copyto, targets, sources))


def measure(
    cases: Iterable[Case],
    *,
    layouts: Iterable[str] = LAYOUTS,
    activations: Iterable[Activation] = ("none", "relu", "hardswish"),
    residuals: Iterable[bool] = (False, True),
    others: Iterable[str] = ("group", "instance"),
    count: int = 9,
    progress: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Every row and summary, ready for JSON.

    Args:
        cases: the tensors.
        layouts: of :data:`benchmarks.shapes.LAYOUTS`.
        activations: behind batch norm.
        residuals: without, with, or both.
        others: norms beside batch norm, alone: group norm, with :func:`benchmarks.shapes.groups`, and instance norm.
        count: rounds.
        progress: is told what is being measured.
    """
    rows: list[Row] = []
    behind, alone = list(activations), list(others)
    variants: list[tuple[str, bool]] = [(activation, residual) for residual in residuals for activation in behind]
    variants += [(norm, False) for norm in alone]
    elsewhere, trips = Others(), [round_trip()]
    with ThreadPoolExecutor(kernels.threads()) as threads:
        for case in cases:
            for layout in layouts:
                progress(f"kernels: {case.name} {layout}")
                rows += _measure(case, layout, variants, count, threads)
                trips.append(round_trip())
    return {
        "rows": [asdict(row) for row in rows],
        "summaries": [asdict(summary) | {"holds": summary.holds} for summary in summarize(rows)],
        "others": elsewhere.processors(),
        "round_trips": trips,
    }


def _measure(
    case: Case, layout: str, variants: list[tuple[str, bool]], count: int, threads: ThreadPoolExecutor
) -> list[Row]:
    tensors = Tensors(case.shape, layout)
    ways = tensors.copies(threads)
    streams = tensors.streaming(threads)
    contenders = ways | streams
    for norm, residual in variants:
        contenders[f"{norm} {residual}"] = _step(tensors, case.shape[1], norm, residual=residual)
    half = case.size == "large" and ("relu", False) in variants
    if half:
        contenders["bfloat16"] = Tensors(case.shape, layout, "bfloat16").step("relu", residual=False)
    times = rounds({name: timer(step) for name, step in contenders.items()}, count)
    copy = np.min([times[way] for way in ways], axis=0)
    stream = np.min([times[way] for way in streams], axis=0)

    def row(norm: str, residual: bool, dtype: str, kernel: Times, yardstick: Times) -> Row:
        amount = copies(norm, residual=residual)
        other_passes = layout == "NHWC" and norm in GROUPED
        return Row(
            case.name,
            case.models,
            case.size,
            case.nbytes / 1e6,
            layout,
            norm,
            residual,
            dtype,
            amount,
            floor=Quartiles.of(amount * copy),
            kernel=Quartiles.of(kernel),
            ratio=Quartiles.of(kernel / yardstick),
            streaming=None if residual or dtype == "bfloat16" or other_passes else Quartiles.of(kernel / stream),
        )

    rows = []
    for norm, residual in variants:
        kernel = times[f"{norm} {residual}"]
        rows.append(row(norm, residual, "float32", kernel, copies(norm, residual=residual) * copy))
    if half:
        rows.append(row("relu", False, "bfloat16", times["bfloat16"], times["relu False"]))
    return rows


def _step(tensors: Tensors, channels: int, norm: str, *, residual: bool) -> Callable[[], None]:
    if norm in GROUPED:
        return tensors.group_step(GROUPED[norm](channels))
    return tensors.step(cast(Activation, norm), residual=residual)


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """Geometric mean and worst ratio by size, layout, and what was computed; tiny tensors have no limit and no line."""
    alike: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.size != "tiny":
            what = row.norm + (" + residual" if row.residual else "")
            alike.setdefault((row.size, row.layout, row.dtype, what), []).append(row)
    found = []
    for (size, layout, dtype, what), members in alike.items():
        worst = max(members, key=lambda row: row.ratio.median)
        limit = HALF_LIMIT if dtype == "bfloat16" else LIMITS[size] if what == "relu" else None
        mean = geometric_mean(row.ratio.median for row in members)
        streaming = [row.streaming.median for row in members if row.streaming]
        found.append(
            Summary(
                size,
                layout,
                dtype,
                what,
                len(members),
                mean,
                worst.ratio.median,
                worst.shape,
                limit,
                streaming_mean=geometric_mean(streaming) if streaming else None,
                streaming_worst=max(streaming, default=None),
            )
        )
    return found
