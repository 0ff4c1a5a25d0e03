"""The tables of :mod:`benchmarks.sync`."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from benchmarks.tables import Result, busy, pages, right, table_of

__all__ = ["sync"]


def sync(result: Result) -> list[RenderableType]:
    """Steps, sums, the model beside them, and what it says of more ranks."""
    return pages(_steps(result), _sums(result), _checks(result), _late(result), *_projections(result))


def _steps(result: Result) -> Table:
    table = table_of("SyncBatchNorm beside BatchNorm: a training step under DataParallel", "a rank's model and batch")
    for heading in (
        "ranks",
        "ranks per\nprocessor",
        "norms",
        "BatchNorm\nms",
        "Sync\nms",
        "in sums\nms",
        "Sync /\nBatch",
    ):
        right(table, heading)
    for row in result["steps"]:
        times = [f"{row[name]['median']:.1f}" for name in ("batch", "sync", "in_sums")]
        load = f"{row['ranks'] / result['processors']:.1f}"
        ratio = f"{row['ratio']['median']:.2f}"
        table.add_row(row["model"], f"{row['ranks']}", load, f"{len(row['channels'])}", *times, ratio)
    table.caption = "one thread a rank; above one rank per processor, steps and sums wait for a processor too\n" + busy(
        result
    )
    return table


def _sums(result: Result) -> Table:
    table = table_of("One sum over the ranks, in microseconds", "ranks")
    for heading in ("values", "bytes", "ours", "Paddle's", "Paddle's\n/ ours"):
        right(table, heading)
    for row in result["sums"]:
        times = [f"{row[name]['median'] * 1e3:.0f}" for name in ("flatwater", "paddle")]
        ratio = f"{row['ratio']['median']:.1f}"
        table.add_row(f"{row['ranks']}", f"{row['length']}", f"{row['length'] * 8}", *times, ratio)
    network = result["networks"]["loopback"]
    table.caption = (
        "ours: with its checks; Paddle's: paddle.distributed.all_reduce (gloo); float64\n"
        f"fitted on the fewest ranks: a message takes α = {network['latency'] * 1e6:.1f} µs "
        f"and its bytes / B, B = {network['bandwidth'] * 1e-9:.2f} GB/s"
    )
    return table


def _checks(result: Result) -> Table:
    table = table_of("The model beside the measurement: a rank's milliseconds in the sums of a step", "model", "ranks")
    for heading in ("sums", "waiting", "predicted", "measured", "measured /\npredicted"):
        right(table, heading)
    for row in result["checks"]:
        times = [f"{row[name]:.1f}" for name in ("messages", "waiting", "predicted", "measured")]
        table.add_row(row["model"], f"{row['ranks']}", *times, f"{row['ratio']:.2f}")
    table.caption = "network: that of the fewest ranks; waiting: by the spread of the ranks' own work in that world"
    return table


def _late(result: Result) -> Table:
    table = table_of("The formula beside sums whose messages come late, as over a network: milliseconds", "ranks")
    for heading in (
        "messages that\nfollow each other",
        "each later\nby",
        "predicted",
        "measured",
        "measured /\npredicted",
    ):
        right(table, heading)
    for row in result["late"]:
        times = [f"{row['delay']:.2f}", f"{row['predicted']:.2f}", f"{row['measured']['median']:.2f}"]
        table.add_row(f"{row['ranks']}", f"{row['messages']}", *times, f"{row['ratio']:.2f}")
    table.caption = "an emulation: whoever has received a message sleeps; the rest is this machine's"
    return table


def _projections(result: Result) -> list[Table]:
    tables = []
    for name, network in result["networks"].items():
        title = f"Predicted, not measured: milliseconds per step, {name} network"
        table = table_of(title, "model", "ranks")
        for heading in ("BatchNorm\nstep", "waiting\nadds", *result["projections"][0]["sums"][name]):
            right(table, heading.replace(", ", ",\n").replace("recursive ", "recursive\n"))
        for row in result["projections"]:
            times = [row["step"], row["waiting"], *row["sums"][name].values()]
            table.add_row(row["model"], f"{row['ranks']}", *(f"{time:.1f}" for time in times))
        source = {
            "loopback": "fitted above: processes of one machine, no network",
            "assumed": "an assumption for TCP over 25-gigabit Ethernet",
            "given": "yours",
        }[name]
        table.caption = (
            f"α = {network['latency'] * 1e6:.1f} µs, B = {network['bandwidth'] * 1e-9:.2f} GB/s: {source}\n"
            "recursive doubling is what SyncBatchNorm does; ring is what gloo's all-reduce would do"
        )
        tables.append(table)
    return tables
