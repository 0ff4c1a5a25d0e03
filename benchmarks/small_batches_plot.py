"""Draw what ``python -m benchmarks small-batches --json FILE`` measured.

``python -m benchmarks.small_batches_plot FILE PNG``
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.small_batches import ARMS, BATCH
from benchmarks.small_batches_report import Row, counting, scores

__all__ = ["draw"]

LINES = {
    "recalibrated": ("recalibrated", "tab:green", "o-"),
    "m = 0.99": ("moving statistics, m = 0.99", "tab:blue", "s-"),
    "m = 0.9": ("moving statistics, m = 0.9", "tab:orange", "^-"),
    "m = 0.9, rank 0's own": ("m = 0.9, rank 0's own", "tab:red", "v:"),
    "m = 0.5": ("moving statistics, m = 0.5", "tab:gray", "D-"),
}


def draw(runs: Sequence[Row], target: Path) -> None:
    """Test accuracy against the samples behind a norm's statistics, a line for what ``eval()`` normalizes with."""
    shares = sorted(BATCH // ranks for ranks in ARMS.values() if ranks)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    places = np.arange(len(shares), dtype=float)
    for index, (statistics, (text, color, style)) in enumerate(LINES.items()):
        found = [scores(runs, f"batch {share}", statistics) for share in shares]
        _line(axes, places + 0.04 * (index - 2), found, text, color, style)
    group = scores(runs, "group", "")
    axes.axhspan(min(group), max(group), color="tab:purple", alpha=0.15, linewidth=0)
    axes.axhline(float(np.mean(group)), color="tab:purple", linestyle="--", label="GroupNorm")
    axes.set_xticks(places, [f"{share}" if share < BATCH else f"{share}\n(SyncBatchNorm)" for share in shares])
    axes.set(
        xlabel=f"samples behind a norm's statistics, of a batch of {BATCH} in all",
        ylabel="test accuracy, %",
        title="Fashion-MNIST: mean of the seeds, lowest to highest",
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _line(axes: Axes, places: np.ndarray, found: list[list[float]], text: str, color: str, style: str) -> None:
    means = np.array([np.mean(values) for values in found])
    below, above = (np.array([end(values) for values in found]) for end in (min, max))
    errors = np.stack([means - below, above - means])
    axes.errorbar(places, means, errors, fmt=style, color=color, label=text, markersize=5, capsize=2, linewidth=1.2)


@click.command("small_batches_plot")
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
def command(source: Path, target: Path) -> None:
    """Draw the part ``small-batches`` of the JSON file SOURCE as the picture TARGET."""
    parts = json.loads(source.read_text(encoding="utf-8"))["parts"]
    result = parts.get("small-batches")
    if result is None:
        raise click.UsageError(f"{source} holds {', '.join(parts) or 'nothing'}; measure the part small-batches first")
    if result["missing"]:
        raise click.UsageError(f"{source} lacks {result['missing']} trainings; the same command goes on with them")
    draw(counting(result), target)


if __name__ == "__main__":
    command()
