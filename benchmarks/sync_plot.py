"""Draw what ``python -m benchmarks sync --json FILE`` measured: ``python -m benchmarks.sync_plot FILE PNG``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.sync_model import Network, messages, sent_bytes, step_seconds

__all__ = ["draw"]

MODEL = "ResNet-18 8x3x64x64"
COLORS = {2: "tab:blue", 4: "tab:orange"}
RANKS = [2**k for k in range(1, 11)]


def draw(result: dict[str, Any], target: Path) -> None:
    """Sums against bytes beside the fit, and a step's sums against ranks, measured and predicted."""
    figure, (sums, steps) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    networks = {name: Network(**values) for name, values in result["networks"].items()}
    _draw_sums(sums, result["sums"], networks["loopback"])
    _draw_steps(steps, result, networks)
    figure.savefig(target, dpi=110)


def _draw_sums(axes: Axes, rows: list[dict[str, Any]], network: Network) -> None:
    for ranks, color in COLORS.items():
        chosen = [row for row in rows if row["ranks"] == ranks]
        sizes = np.array([8.0 * row["length"] for row in chosen])
        for contender, label, style in (("paddle", "gloo", "s:"), ("flatwater", "ours", "o-")):
            times = [row[contender]["median"] * 1e3 for row in chosen]
            axes.plot(sizes, times, style, color=color, label=f"{label}, {ranks} processes", markersize=4)
        fitted = [messages(ranks) * network.message(sent_bytes(row["length"])) * 1e6 for row in chosen]
        axes.plot(sizes, fitted, "--", color=color, linewidth=1, label=f"{messages(ranks)}·(α + n/B)")
    axes.set(xscale="log", yscale="log", xlabel="bytes of the vector", ylabel="µs", title="One sum, measured")
    _finish(axes)


def _draw_steps(axes: Axes, result: dict[str, Any], networks: dict[str, Network]) -> None:
    measured = [row for row in result["steps"] if row["model"] == MODEL]
    channels = measured[0]["channels"]
    for name, color in (("loopback", "tab:blue"), ("assumed", "tab:green")):
        for algorithm, style in (("recursive doubling", "-"), ("ring", ":")):
            times = [step_seconds(channels, ranks, networks[name], algorithm) * 1e3 for ranks in RANKS]
            axes.plot(RANKS, times, style, color=color, label=f"{algorithm}, {name} network")
    projected = [row for row in result["projections"] if row["model"] == MODEL]
    waiting = [row["waiting"] for row in projected]
    axes.plot([row["ranks"] for row in projected], waiting, "^--", color="tab:gray", label="waiting for the slowest")
    axes.axhline(measured[0]["batch"]["median"], color="black", linewidth=1, label="BatchNorm's step, 2 processes")
    processors = result["processors"]
    for crowded, face in ((False, "tab:red"), (True, "white")):
        rows = [row for row in measured if (row["ranks"] > processors) == crowded]
        label = f"measured in sums, waiting included{f' ({processors} processors)' if crowded else ''}"
        points = [row["in_sums"]["median"] for row in rows]
        axes.plot([row["ranks"] for row in rows], points, "o", color="tab:red", markerfacecolor=face, label=label)
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="ms per training step")
    axes.set_title(f"{MODEL}: predicted, but for what is red")
    axes.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
    axes.minorticks_off()
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
def command(source: Path, target: Path) -> None:
    """Draw the part ``sync`` of the JSON file SOURCE as the picture TARGET."""
    parts = json.loads(source.read_text(encoding="utf-8"))["parts"]
    if "sync" not in parts:
        raise click.UsageError(f"{source} holds {', '.join(parts) or 'nothing'}; measure the part sync first")
    draw(parts["sync"], target)


if __name__ == "__main__":
    command()
