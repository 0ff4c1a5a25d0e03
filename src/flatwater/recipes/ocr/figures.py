"""The report's pictures: matplotlib drawings as inline SVG that takes its colours and type from the page.

Every colour below is a name in disguise. Matplotlib knows only real colours, so each role has one that nothing
else uses, and :func:`_finish` turns it into the page's CSS variable: one drawing then serves light, dark and print.
Text stays text (``svg.fonttype: none``), set in the page's own typeface.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from flatwater.recipes.ocr.results import Distribution, LayerNorms, NormSample

__all__ = ["Series", "curves", "layer_overview", "ridges", "running_statistic"]

_INK, _MUTED, _GRID, _CARD, _FIRST, _SECOND = (f"#0{role}0{role}0{role}" for role in range(1, 7))
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
    _CARD: "var(--card)",
    _FIRST: "var(--first)",
    _SECOND: "var(--second)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flatwater",  # the same run draws the same bytes
    "font.size": 11,
    "text.color": _INK,
    "axes.facecolor": "none",
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "path.simplify": True,
    "path.simplify_threshold": 0.3,
    "xtick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "xtick.major.size": 3,
    "ytick.color": _GRID,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
}
_RIDGES = 8  # more steps than this overlap into a blur
_LOG_FROM_SPREAD = 30.0  # beyond this ratio a linear axis hides the small channels


class Series(NamedTuple):
    """One line of :func:`curves`, as (step, value); ``smooth`` draws it faintly, its moving average over it."""

    points: Sequence[tuple[int, float]]
    second: bool = False
    smooth: bool = False


def curves(series: Sequence[Series], *, label: str, log: bool = False, percent: bool = False) -> Markup:
    """Lines over training steps."""
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(340, 210, left=50)
        for one in series:
            colour = _SECOND if one.second else _FIRST
            steps, values = np.asarray(one.points, dtype=np.float64).T
            if one.smooth and len(values) > 20:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9)
                values = _moving_average(values, len(values) // 30 + 1)
            axes.plot(steps, values, color=colour, marker="o" if len(values) < 3 else None, markersize=4)
        if log:
            _log_axis(axes)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        if percent:
            lowest = min(value for one in series for _, value in one.points)
            axes.set_ylim(max(-0.02, min(0.9, lowest - 0.05)), 1.01)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _step_axis(axes)
        return _finish(figure, label)


def ridges(samples: Sequence[NormSample], side: str, *, label: str) -> Markup:
    """The histograms of one side (``"before"`` or ``"after"``) over time: the first step behind, the last in front."""
    usable = [(one.step, found) for one in samples if (found := _histogram(getattr(one, side))) is not None]
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(250, 190, left=34)
        chosen = _evenly(usable, _RIDGES)
        rows = len(chosen)
        for row, (step, (edges, density)) in enumerate(chosen):
            base = float(rows - 1 - row)
            colour = _FIRST if side == "before" else _SECOND
            x = np.concatenate([edges[:1], (edges[1:] + edges[:-1]) / 2, edges[-1:]])
            y = base + 1.7 * np.concatenate([[0.0], density / density.max(), [0.0]])
            axes.fill_between(x, base, y, color=_CARD, linewidth=0, zorder=2 * row + 2)
            strength = 0.2 + 0.6 * (row + 1) / rows
            axes.fill_between(x, base, y, color=colour, alpha=strength, linewidth=0, zorder=2 * row + 3)
            axes.plot(x, y, color=colour, linewidth=0.8, zorder=2 * row + 3)
            axes.text(-0.03, base, f"{step:,}", transform=axes.get_yaxis_transform(), ha="right", va="center",
                      color=_MUTED, fontsize=9)  # fmt: skip
        axes.axvline(0.0, color=_MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=100)
        axes.yaxis.set_major_locator(NullLocator())
        axes.set_ylim(-0.15, max(rows, 1) + 0.8)
        if chosen:
            low, high = min(one[1][0][0] for one in chosen), max(one[1][0][-1] for one in chosen)
            axes.set_xlim(min(low, 0.0), max(high, 0.0))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(visible=False)
        return _finish(figure, label)


def running_statistic(samples: Sequence[NormSample], statistic: str, *, label: str) -> Markup:
    """A running statistic over steps: the median channel, the middle half of the channels, and all of them."""
    steps, numbers = [], []
    for sample in samples:
        five = getattr(sample, statistic)
        if five is not None and all(number is not None and math.isfinite(number) for number in five):
            steps.append(sample.step)
            numbers.append(five)
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(250, 190, left=44)
        if numbers:
            low, lower, middle, upper, high = np.asarray(numbers, dtype=np.float64).T
            axes.fill_between(steps, low, high, color=_FIRST, alpha=0.16, linewidth=0)
            axes.fill_between(steps, lower, upper, color=_FIRST, alpha=0.35, linewidth=0)
            axes.plot(steps, middle, color=_FIRST, marker="o" if len(steps) < 3 else None, markersize=4)
            if statistic == "running_variance" and low.min() > 0 and high.max() / low.min() > _LOG_FROM_SPREAD:
                _log_axis(axes)
            else:
                axes.yaxis.set_major_locator(MaxNLocator(4))
        _step_axis(axes, ticks=3)
        return _finish(figure, label)


def layer_overview(layers: Sequence[LayerNorms], levels: Sequence[float]) -> Markup:
    """Every layer at its last sample: the middle 90% and 50% of what goes in, and of what comes out normalized."""
    rows = [(layer, layer.samples[-1]) for layer in layers if layer.samples]
    wanted = [_nearest(levels, level) for level in (0.05, 0.25, 0.5, 0.75, 0.95)]
    with mpl.rc_context(_STYLE):
        longest = max((len(layer.path) for layer, _ in rows), default=0)
        figure, axes = _canvas(680, 54 + 26 * max(len(rows), 1), left=min(230, 16 + 7 * longest))
        for row, (_, sample) in enumerate(rows):
            for side, offset, colour in (("before", -0.17, _FIRST), ("after", 0.17, _SECOND)):
                quantiles = [getattr(sample, side).quantiles[index] for index in wanted]
                if any(quantile is None for quantile in quantiles):
                    continue
                low, lower, middle, upper, high = quantiles
                place = row + offset
                axes.plot([low, high], [place, place], color=colour, linewidth=2, alpha=0.45)
                axes.plot([lower, upper], [place, place], color=colour, linewidth=6, solid_capstyle="butt")
                axes.plot([middle], [place], color=_CARD, marker="o", markersize=3, zorder=5)
        axes.set_yticks(range(len(rows)), [layer.path or "(the model)" for layer, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.axvline(0.0, color=_MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        # Layers differ by orders of magnitude: linear within ±1, logarithmic beyond.
        axes.set_xscale("symlog", linthresh=1.0)
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(visible=False, axis="y")
        return _finish(figure, "The spread of each layer's values before and after normalization, at the last sample")


def _canvas(width: int, height: int, *, left: int) -> tuple[Figure, Axes]:
    """A figure of so many CSS pixels, with the same margins every time, so that panels in a grid line up."""
    right, bottom, top = 12, 24, 10
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    return figure, axes


def _step_axis(axes: Axes, *, ticks: int = 5) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(visible=False, axis="x")


def _plain(value: float, _: int | None) -> str:
    return f"{value:g}".replace("-", "−")


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    within = [1.0, 2.0, 5.0] if high < 30 * low else [1.0, 3.0] if high < 1000 * low else [1.0]
    axes.yaxis.set_major_locator(LogLocator(subs=within, numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))


def _moving_average(values: np.ndarray[Any, np.dtype[np.float64]], width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Over the last ``width`` values; over as many as there are at the beginning."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    average: np.ndarray[Any, np.dtype[np.float64]] = (sums[ends] - sums[starts]) / (ends - starts)
    return average


def _histogram(distribution: Distribution) -> tuple[Any, Any] | None:
    """Bin edges and counts; None where no value was finite."""
    if distribution.low is None or distribution.high is None or not any(distribution.counts):
        return None
    edges = np.linspace(distribution.low, distribution.high, len(distribution.counts) + 1)
    return edges, np.asarray(distribution.counts, dtype=np.float64)


def _evenly(items: Sequence[Any], keep: int) -> list[Any]:
    """At most ``keep`` of the items, the first and the last among them."""
    if len(items) <= keep:
        return list(items)
    return [items[round(index * (len(items) - 1) / (keep - 1))] for index in range(keep)]


def _nearest(levels: Sequence[float], wanted: float) -> int:
    return min(range(len(levels)), key=lambda index: abs(levels[index] - wanted))


def _finish(figure: Figure, label: str) -> Markup:
    """The figure as an SVG element without a fixed size, whose ids collide with no other figure's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening).replace(
        "<svg", f'<svg role="img" aria-label="{escape(label)}"'
    )
    rest = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|font-family: [^;\"]*;", "", rest, flags=re.DOTALL)
    rest = re.sub(r' (d|x|y|transform)="[^"]*"', lambda match: _to_tenths(match.group()), rest)
    prefix = f"f{zlib.crc32(rest.encode()):08x}-"
    rest = re.sub(r'id="|url\(#|href="#', lambda match: match.group() + prefix, rest)
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(colour, variable)
    return Markup(opening + ">" + re.sub(r"\s*\n\s*", " ", rest))


def _to_tenths(coordinates: str) -> str:
    """A tenth of a pixel will do, and makes the page a third as long."""
    return re.sub(r"\d+\.\d{2,}", lambda match: f"{float(match.group()):.1f}", coordinates)
