"""How far batch norm's results are from float64, on ordinary and on hard data, ours beside the frameworks' own.

The error of a result is the root mean square of its difference from :mod:`flatwater.reference`, as a share of the root
mean square there, over several draws of the data; the largest difference stands beside it in the JSON. Outputs,
gradients and the running variance come from one training step in float32, on the same numbers for all.
"""

from __future__ import annotations

import math
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import machine
from benchmarks.hard_data import CASES, HardCase, hard_case, read_results, write_case
from benchmarks.shapes import LAYOUTS, memory_shape
from benchmarks.worker import Worker
from flatwater import kernels, reference

__all__ = ["Row", "errors", "expected", "measure", "same_bits"]

MOMENTUM = 0.9

CONTENDERS = ("flatwater", "paddle", "torch")

RESULTS = ("y", "dx", "dγ", "dβ", "running variance")

DRAWS = 8
"""Of each case: a single draw says more about its luck than about the arithmetic."""

Results = dict[str, npt.NDArray[Any]]

Pair = tuple[Results, Results]
"""What was computed, and what float64 says."""

THREADS = (1, 2, 3, 8)


@dataclass(frozen=True)
class Row:
    """One result of one case: each contender's errors; nan where it returned something that is no number."""

    case: str
    result: str
    rms: dict[str, float]
    largest: dict[str, float]

    @property
    def best(self) -> bool:
        """Whether our RMS error is the smallest or equal."""
        ours, *others = (self.rms[name] for name in CONTENDERS if name in self.rms)
        return not math.isnan(ours) and all(math.isnan(other) or ours <= other for other in others)


def errors(computed: npt.NDArray[Any], exact: npt.NDArray[np.float64]) -> tuple[float, float]:
    """RMS and largest difference, as shares of the RMS and largest exact value; nan for what is wrongly no number.

    Where the exact value is past the largest float32, infinity is the right answer, and no error.
    """
    with np.errstate(over="ignore"):
        right = computed == exact.astype(computed.dtype)
    if not np.isfinite(computed[~right]).all():
        return math.nan, math.nan
    difference = np.where(right & ~np.isfinite(computed), 0.0, computed.astype(np.float64) - exact)
    rms = math.sqrt(np.mean(difference**2) / np.mean(exact**2))
    return rms, float(np.max(np.abs(difference)) / np.max(np.abs(exact)))


def expected(case: HardCase) -> Results:
    """What float64 says. The running variance starts at 0, so that the batch's alone is in it."""
    given: dict[str, Any] = {"weight": case.weight, "bias": case.bias, "epsilon": case.epsilon}
    forward = reference.batch_norm(case.x, **given)
    gradients = reference.batch_norm_gradients(case.dy, case.x, **given)
    zeros = np.zeros_like(case.weight)
    _, variance = reference.update_running(zeros, zeros, forward.statistics, momentum=MOMENTUM)
    results = {"y": forward.y, "dx": gradients.x, "dγ": gradients.weight, "dβ": gradients.bias}
    return results | {"running variance": variance}


def measure(*, torch: bool, quick: bool = False) -> dict[str, Any]:
    """Every row of the table, and whether bits depend on the number of threads.

    Args:
        torch: whether PyTorch takes part.
        quick: two draws of each case instead of :data:`DRAWS`.
    """
    rows = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source, target = folder / "case.npz", folder / "results.npz"
        at = {"source": str(source), "target": str(target)}
        paddle = stack.enter_context(Worker("paddle_worker", machine.tuned_environment()))
        callers = {
            "flatwater": partial(paddle.call, "batch_norm", brand="flatwater", **at),
            "paddle": partial(paddle.call, "batch_norm", brand="stock", **at),
        }
        if torch:
            worker = stack.enter_context(Worker("torch_worker", machine.tuned_environment()))
            callers["torch"] = partial(worker.call, "batch_norm", **at)

        for name in CASES:
            pairs: dict[str, list[Pair]] = {contender: [] for contender in callers}
            for seed in range(2 if quick else DRAWS):
                case = hard_case(name, seed)
                write_case(source, case)
                exact = expected(case)
                for contender, call in callers.items():
                    call()
                    pairs[contender].append((read_results(target), by_convention(contender, case, exact)))
            rows += [_row(name, result, pairs) for result in RESULTS]
    return {"rows": [asdict(row) | {"best": row.best} for row in rows], "bits": same_bits()}


def by_convention(contender: str, case: HardCase, exact: Results) -> Results:
    """What this framework should have found: PyTorch's running variance divides by n - 1, Paddle's by n."""
    if contender != "torch":
        return exact
    count = case.x.size // case.weight.size
    return exact | {"running variance": exact["running variance"] * count / (count - 1)}


def _row(case: str, result: str, pairs: dict[str, list[Pair]]) -> Row:
    found = {}
    for contender, draws in pairs.items():
        computed, exact = (np.stack([draw[side][result] for draw in draws]) for side in (0, 1))
        found[contender] = errors(computed, exact)
    rms, largest = ({who: pair[which] for who, pair in found.items()} for which in (0, 1))
    return Row(case, result, rms, largest)


def same_bits() -> list[dict[str, Any]]:
    """For shapes that divide badly among threads: whether each number of :data:`THREADS` gives the same bits."""
    before, rows = kernels.threads(), []
    try:
        for shape in ((8, 24, 56, 56), (3, 7, 13, 11), (32, 512, 7, 7), (1, 1, 224, 224)):
            for layout in LAYOUTS:
                results = []
                for threads in THREADS:
                    kernels.set_threads(threads)
                    results.append(_step(shape, layout))
                rows.append({"shape": shape, "layout": layout, "same": len(set(results)) == 1})
    finally:
        kernels.set_threads(before)
    return rows


def _step(shape: tuple[int, int, int, int], layout: str) -> bytes:
    """The bits of everything that one forward and backward pass computes."""
    channels, generator = shape[1], np.random.default_rng(0)
    x, dy = generator.standard_normal((2, *memory_shape(shape, layout)), np.float32)
    y, dx = np.empty_like(x), np.empty_like(x)
    known: dict[str, Any] = {"mean": np.zeros(channels), "inv_std": np.zeros(channels)}
    sums: dict[str, Any] = {"sum_dz": np.zeros(channels), "sum_dz_xhat": np.zeros(channels)}
    m2 = np.zeros(channels)
    as_buffer = partial(kernels.Buffer.from_numpy, channels_last=layout == "NHWC")
    kernels.batch_norm_forward(as_buffer(x), as_buffer(y), m2=m2, epsilon=1e-5, activation="relu", **known)
    kernels.batch_norm_backward(as_buffer(dy), as_buffer(x), as_buffer(dx), None, activation="relu", **known, **sums)
    return b"".join(array.tobytes() for array in (y, dx, m2, *known.values(), *sums.values()))
