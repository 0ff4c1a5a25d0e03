"""Memory of a training step: its peak, its page faults in the steady state, and what the pool gives back.

Every figure comes from a fresh process, for an allocator's past is part of what it does. The peak is that of resident
memory, which counts what Python and every library allocate alike. It is taken in the default environment: there the C
library returns a large tensor to the system when it is freed, so that what is resident is what is alive, or kept by
Flatwater's pool; in the tuned one it would be the shape of the heap.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import machine
from benchmarks.shapes import Case
from benchmarks.timing import FEW_FAULTS
from benchmarks.worker import Worker

__all__ = ["Faults", "Peak", "measure"]

WARM_STEPS, STEPS = 30, 10

GRAPHS = tuple(
    (neighbours, norm, blocks)
    for neighbours in ("scale", "conv")
    for norm, blocks in (
        ("relu", 1),
        ("relu", 4),
        *((f"{activation}+residual", 4) for activation in ("relu", "none", "hardswish")),
    )
)
"""Neighbours, norms and blocks of the graphs whose peak is measured."""


@dataclass(frozen=True)
class Peak:
    """Bytes by which one step of norms between neighbours raises the peak; medians of processes."""

    shape: str
    neighbours: str
    norm: str
    blocks: int
    tensor: int
    stock: int
    flatwater: int

    @property
    def saved(self) -> float:
        """How many tensors less ours needs than Paddle's own."""
        return (self.stock - self.flatwater) / self.tensor

    @property
    def holds(self) -> bool:
        """Whether that is one activation's copy for each block that keeps one, to a hundredth of it.

        A convolution behind a block needs its input for its own gradient: then Paddle's own keeps no copy beside that,
        and what is asked for is that ours needs no more. As with a residual, from which alone the activation's input
        cannot be computed again.
        """
        copies = self.blocks if (self.neighbours, self.norm) == ("scale", "relu") else 0
        return self.saved >= copies - 0.01


@dataclass(frozen=True)
class Faults:
    """Page faults per step in the steady state; ``bare`` are those of the graph without a norm."""

    shape: str
    layout: str
    environment: str
    bare: float
    stock: float
    flatwater: float

    @property
    def own(self) -> float:
        """What Flatwater's layer adds to the graph's."""
        return self.flatwater - self.bare

    @property
    def holds(self) -> bool:
        """Whether that is none."""
        return self.own < FEW_FAULTS


def measure(
    cases: Iterable[Case],
    *,
    layouts: Iterable[str],
    environments: Iterable[str],
    count: int = 3,
    progress: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Every row, ready for JSON.

    Args:
        cases: the tensors; those that are not large are left out.
        layouts: for the page faults.
        environments: for the page faults; keys of :data:`benchmarks.machine.ENVIRONMENTS`.
        count: processes behind each peak.
        progress: is told what is being measured.
    """
    large = [case for case in cases if case.size == "large"]
    peaks, faults = [], []
    for case in large:
        for neighbours, norm, blocks in GRAPHS:
            progress(f"memory: peak of {case.name}, {blocks} × {neighbours}, {norm}")
            graph = {"neighbours": neighbours, "norm": norm, "blocks": blocks}
            found = {
                brand: int(statistics.median(_ask("default", "peak", case, brand=brand, **graph) for _ in range(count)))
                for brand in ("stock", "flatwater")
            }
            peaks.append(Peak(case.name, neighbours, norm, blocks, case.nbytes, **found))
    for environment in environments:
        for case in large:
            for layout in layouts:
                progress(f"memory: page faults of {case.name} {layout}, {environment} environment")
                arguments = {"layout": layout, "warm": WARM_STEPS, "steps": STEPS}
                steady = {
                    brand: float(_ask(environment, "faults", case, brand=brand, **arguments))
                    for brand in ("bare", "stock", "flatwater")
                }
                faults.append(Faults(case.name, layout, environment, **steady))
    # Where the C library was told to keep what is freed, Flatwater leaves large tensors to it as well.
    with Worker("memory_worker", machine.default_environment()) as worker:
        progress("memory: the pool")
        pool = worker.call("bounded", shapes=[case.shape for case in large], steps=STEPS)
    return {
        "peaks": [asdict(row) | {"saved": row.saved, "holds": row.holds} for row in peaks],
        "faults": [asdict(row) | {"own": row.own, "holds": row.holds} for row in faults],
        "pool": pool,
    }


def _ask(environment: str, what: str, case: Case, **arguments: Any) -> Any:
    with Worker("memory_worker", machine.ENVIRONMENTS[environment]()) as worker:
        return worker.call(what, shape=case.shape, **arguments)
