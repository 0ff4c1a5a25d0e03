"""The tables of :mod:`benchmarks.small_batches`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

__all__ = ["COLUMNS", "counting", "label", "results", "scores", "small_batches"]

COLUMNS = {
    "m = 0.9": "m = 0.9",
    "m = 0.99": "m = 0.99",
    "m = 0.5": "m = 0.5",
    "m = 0.9, rank 0's own": "m = 0.9,\nrank 0's own",
    "recalibrated": "recali-\nbrated",
}
"""What batch norm has in ``eval()``, by its key in ``Run.test``, and its heading."""

Row = Mapping[str, Any]


def scores(runs: Sequence[Row], arm: str, statistics: str) -> list[float]:
    """Test accuracies in percent, by seed. Group norm has but one."""
    chosen = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
    return [100 * run["test"].get(statistics, run["test"].get("")) for run in chosen]


def label(arm: str, batch: int) -> str:
    """How an arm is called in tables and plots."""
    if arm == "group":
        return "GroupNorm"
    share = int(arm.removeprefix("batch "))
    return f"SyncBatchNorm: all {batch}" if share == batch else f"BatchNorm: {share} of {batch}"


def small_batches(result: Row) -> list[RenderableType]:
    """The tables of what :func:`benchmarks.small_batches.measure` returned, as far as it came."""
    shown: list[RenderableType] = [_proofs(result["proofs"])]
    if result["runs"]:
        shown += [_rates(result), results(counting(result), result["batch"])]
    if result["missing"]:
        shown.append(f"{result['missing']} trainings to come; the same command goes on")
    return shown


def counting(result: Row) -> list[Row]:
    """The trainings with the learning rate that was chosen for their arm."""
    return [run for run in result["runs"] if run["rate"] == result["rates"][run["arm"]]]


def results(runs: Sequence[Row], batch: int) -> Table:
    """Test accuracy of every arm, the mean of its seeds and how far they lie apart."""
    seeds = {run["seed"] for run in runs}
    table = Table(
        title=f"Test accuracy in percent, mean of {len(seeds)} seeds and lowest to highest, batch {batch} in all",
        caption="m: the share of the OLD statistics that a step keeps\n"
        f"SyncBatchNorm over any number of ranks is batch norm of all {batch} samples on one device",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("norm, and samples\nbehind its statistics", no_wrap=True)
    table.add_column("learning\nrate", justify="right")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in dict.fromkeys(run["arm"] for run in runs):
        rate = next(run["rate"] for run in runs if run["arm"] == arm)
        columns = ["m = 0.9"] if arm == "group" else [*COLUMNS]
        table.add_row(label(arm, batch), f"{rate:g}", *[_spread(scores(runs, arm, column)) for column in columns])
    return table


def _rates(result: Row) -> Table:
    """Accuracy on the validation images by learning rate, which chooses one for each arm."""
    rates = sorted({run["rate"] for run in result["runs"]})
    table = Table(title="Validation accuracy in percent by learning rate, mean of the seeds", box=box.SIMPLE_HEAD)
    table.add_column("norm, and samples\nbehind its statistics", no_wrap=True)
    for rate in rates:
        table.add_column(f"{rate:g}", justify="right")
    for arm, chosen in result["rates"].items():
        cells = []
        for rate in rates:
            found = [100 * run["validation"] for run in result["runs"] if (run["arm"], run["rate"]) == (arm, rate)]
            text = f"{sum(found) / len(found):.2f}" if found else ""
            cells.append(f"[bold]{text}[/]" if rate == chosen else text)
        table.add_row(label(arm, result["batch"]), *cells)
    return table


def _proofs(rows: Sequence[Row]) -> Table:
    """How far the emulated ranks are from real ones."""
    table = Table(title="Emulated ranks beside real processes, largest difference", box=box.SIMPLE_HEAD)
    for heading in ("norm", "ranks", "steps", "loss", "weights, of the largest"):
        table.add_column(heading, justify="left" if heading == "norm" else "right")
    for row in rows:
        numbers = f"{row['loss']:.1e}", f"{row['weights']:.1e}"
        table.add_row(row["norm"], str(row["ranks"]), str(row["steps"]), *numbers)
    return table


def _spread(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}\n{min(values):.1f}–{max(values):.1f}"
