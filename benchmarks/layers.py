"""The layer in a model, beside what a user could have instead.

Each contender is a graph: an operator that produces the norm's input, the norm and its activation, and an operator that
consumes its output, forward and backward. The time of the same graph without the norm, taken in the same round, is
subtracted. What autograd, allocation and Python cost is so in the figure, and what a leaf's gradient costs is not. A
residual is produced like the input, and its producer gets a gradient in the graph without the norm, too.

================  ======================================================================================
flatwater         ``flatwater.paddle.BatchNorm2D(act=...)``, ``GroupNorm``, ``InstanceNorm2D``
paddle            ``paddle.nn.BatchNorm2D`` and the activation's layer, in the same layout
contiguous        ``torch.nn.BatchNorm2d`` and the activation's module, NCHW
channels_last     the same on tensors of that memory format
onednn            the same on ``to_mkldnn()`` tensors, the one road to oneDNN's batch norm in PyTorch that
                  trains; its fused ReLU is not on it, and hardswish does not exist there
================  ======================================================================================

Paddle and PyTorch run in processes of their own, one pair for each environment (:mod:`benchmarks.worker`), and all take
their turns in the same rounds. The processes are new for each tensor, and their heaps have settled before anything is
timed: after larger tensors the heap that an allocator was told to keep is another, and while it grows a step pays for
fresh memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.round_trip import round_trip
from benchmarks.shapes import Case
from benchmarks.timing import Others, Quartiles, Timer, Times, geometric_mean, rounds
from benchmarks.worker import Worker

__all__ = ["GOALS", "Row", "Summary", "measure", "rows_of", "summarize"]

TORCH = ("contiguous", "channels_last", "onednn")

GOALS: dict[str, dict[str, float]] = {
    "batch": {"paddle": 3.0, "better torch": 2.5},
    "none": {"paddle": 2.0},
    "group": {"paddle": 2.0},
    "instance": {"paddle": 2.0},
}
"""Geometric means to reach in the tuned environment, by :func:`goal_of` the norm and by contender."""

ALONE = ("none", "group", "instance")
"""Norms with nothing behind them."""

FUSED = "fused"
"""All others together: batch norm with an activation, a residual, or both."""


@dataclass(frozen=True)
class Row:
    """One tensor, environment, layout and norm."""

    shape: str
    models: tuple[str, ...]
    environment: str
    layout: str
    norm: str
    times: dict[str, Quartiles]
    """Milliseconds by contender, the graph's own taken off."""
    ratios: dict[str, Quartiles]
    """Of a contender's time and ours, by contender: above 1 ours is faster."""

    @property
    def slower_than(self) -> list[str]:
        """Those beside which ours is slower: their median ratio is below 1."""
        return [name for name, ratio in self.ratios.items() if ratio.median < 1]


@dataclass(frozen=True)
class Summary:
    """Ours beside one contender, over all tensors of an environment, layout and norm."""

    environment: str
    layout: str
    norm: str
    contender: str
    tensors: int
    """Those with a ratio: where a norm takes less time than the graph's noise, there is none."""
    geometric_mean: float
    worst: float
    worst_shape: str
    slower_on: int
    goal: float | None

    @property
    def holds(self) -> bool | None:
        """Whether the goal is reached and ours is slower nowhere; None in the default environment, which has none."""
        if self.environment != "tuned":
            return None
        return not self.slower_on and (self.goal is None or self.geometric_mean >= self.goal)


def goal_of(norm: str) -> Mapping[str, float]:
    """The goals of a norm, which is an activation behind batch norm, ``group`` or ``instance``."""
    return GOALS.get(norm, GOALS["batch"])


def measure(
    cases: Iterable[Case],
    *,
    layouts: Sequence[str],
    norms: Sequence[str],
    environments: Sequence[str],
    torch: bool,
    count: int = 7,
    progress: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Every row and summary, ready for JSON.

    Args:
        cases: the tensors.
        layouts: of Flatwater's and Paddle's tensors; PyTorch takes part in all of its own.
        norms: activations behind batch norm (``none``: batch norm alone), each also with ``+residual``, which is added
            before it; ``group``, ``instance``.
        environments: keys of :data:`benchmarks.machine.ENVIRONMENTS`.
        torch: whether PyTorch takes part.
        count: rounds.
        progress: is told what is being measured.
    """
    activations = [norm for norm in norms if norm not in ("group", "instance")]
    # What each framework makes for a tensor: the module of its worker, and the arguments of its handler prepare.
    made = {"paddle": ("paddle_worker", {"layouts": layouts, "norms": norms})}
    if torch and activations:
        made["torch"] = ("torch_worker", {"norms": activations})

    rows: list[Row] = []
    described: dict[str, Any] = {}
    busy, trips = 0.0, [round_trip()]
    for case in cases:
        progress(f"layers: {case.name}")
        with ExitStack() as stack:
            workers = {
                (environment, framework): stack.enter_context(Worker(module, machine.ENVIRONMENTS[environment]()))
                for environment in environments
                for framework, (module, _) in made.items()
            }
            timers: dict[str, Timer] = {}
            for (environment, framework), worker in workers.items():
                described[f"{framework} {environment}"] = worker.call("describe")
                for contender in worker.call("prepare", shape=case.shape, **made[framework][1]):
                    timers[f"{environment} {framework} {contender}"] = worker.timer(contender)
            others = Others(*(worker.pid for worker in workers.values()))
            rows += rows_of(case, rounds(timers, count), layouts, norms, environments)
            busy = max(busy, others.processors())
            trips.append(round_trip())
    return {
        "rows": [asdict(row) | {"slower_than": row.slower_than} for row in rows],
        "summaries": [asdict(summary) | {"holds": summary.holds} for summary in summarize(rows)],
        "workers": described,
        "others": busy,
        "round_trips": trips,
    }


def rows_of(
    case: Case, times: Mapping[str, Times], layouts: Iterable[str], norms: Iterable[str], environments: Iterable[str]
) -> list[Row]:
    """The rows of one tensor.

    Args:
        case: the tensor.
        times: by ``ENVIRONMENT paddle LAYOUT NORM BRAND``, ``ENVIRONMENT torch FORMAT NORM``, and with ``bare`` for
            norm and brand the graphs without one, with ``bare+residual`` those whose residual nothing is added to.
        layouts: of Flatwater's and Paddle's tensors.
        norms: what was measured.
        environments: where it was.
    """
    rows = []
    for environment in environments:
        for layout in layouts:
            for norm in norms:
                own = _less_graph(times, f"{environment} paddle {layout}", norm)
                if "flatwater" not in own:  # instance norm in NHWC, which Paddle lacks
                    continue
                found = {"flatwater": own["flatwater"], "paddle": own["stock"]}
                for memory_format in TORCH:
                    for time in _less_graph(times, f"{environment} torch {memory_format}", norm).values():
                        found[memory_format] = time
                if "contiguous" in found:
                    found["better torch"] = np.minimum(found["contiguous"], found["channels_last"])
                ours = found["flatwater"]
                ratios = {name: Quartiles.of(_ratio(time, ours)) for name, time in found.items() if time is not ours}
                quartiles = {name: Quartiles.of(time) for name, time in found.items()}
                rows.append(Row(case.name, case.models, environment, layout, norm, quartiles, ratios))
    return rows


def _less_graph(times: Mapping[str, Times], graph: str, norm: str) -> dict[str, Times]:
    """By brand ("" where there is one only), what the norm adds to the graph."""
    bare = f"{graph} bare+residual" if norm.endswith("+residual") else f"{graph} bare"
    found = {}
    for name, time in times.items():
        if f"{name} ".startswith(f"{graph} {norm} "):
            found[name.removeprefix(f"{graph} {norm}").strip()] = time - times[bare]
    return found


def _ratio(time: Times, ours: Times) -> Times:
    """By round; nan where noise made one of the differences negative."""
    return np.divide(time, ours, out=np.full_like(ours, np.nan), where=(time > 0) & (ours > 0))


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Geometric mean and worst ratio by environment, layout, norm (also :data:`FUSED`) and contender."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for fused in (False, True):
        for row in rows:
            if not fused or row.norm not in ALONE:
                for contender in row.ratios:
                    key = row.environment, row.layout, FUSED if fused else row.norm, contender
                    groups.setdefault(key, []).append(row)
    found = []
    for (environment, layout, norm, contender), members in groups.items():
        ratios = {(row.shape, row.norm): row.ratios[contender].median for row in members}
        ratios = {key: ratio for key, ratio in ratios.items() if not math.isnan(ratio)}
        worst = min(ratios, key=lambda key: ratios[key], default=("", ""))
        found.append(
            Summary(
                environment,
                layout,
                norm,
                contender,
                tensors=len(ratios),
                geometric_mean=geometric_mean(ratios.values()),
                worst=ratios.get(worst, math.nan),
                worst_shape=worst[0],
                slower_on=sum(ratio < 1 for ratio in ratios.values()),
                goal=goal_of(norm).get(contender),
            )
        )
    return found
