"""The results as tables for a terminal of 100 columns. What misses its limit is red, and marked with ``!``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from benchmarks.host import GOAL
from benchmarks.kernels import LIMITS
from benchmarks.tables import MISSED, Result, busy, mark, pages, right, table_of
from benchmarks.timing import geometric_mean

__all__ = ["accuracy", "host", "kernels", "layers", "memory"]

TITLES = {
    "none": "Batch norm",
    "relu": "Batch norm + ReLU",
    "hardswish": "Batch norm + hardswish",
    "none+residual": "Batch norm + residual",
    "relu+residual": "Batch norm + residual, ReLU",
    "hardswish+residual": "Batch norm + residual, hardswish",
    "group": "Group norm",
    "instance": "Instance norm",
}

HEADINGS = {
    "paddle": "Paddle",
    "contiguous": "torch\nNCHW",
    "channels_last": "torch\nc.last",
    "onednn": "torch\noneDNN",
    "better torch": "torch\nbetter",
}


def kernels(result: Result) -> list[RenderableType]:
    """One table for each layout, with a column for each norm, and one of summaries."""
    tables: list[Table] = []
    layouts = _unique(row["layout"] for row in result["rows"])
    for layout in layouts:
        rows = [row for row in result["rows"] if row["layout"] == layout and row["dtype"] == "float32"]
        variants = _unique((row["norm"], row["residual"]) for row in rows)
        table = table_of(f"Kernels alone, {layout}: forward + backward / floor, float32", "shape", "MB", "floor\nms")
        for norm, residual in variants:
            right(table, f"{norm}\n+ residual" if residual else norm)
        plain = _unique(row["norm"] for row in rows if row["streaming"])
        streamed = "relu" if "relu" in plain else plain[0] if plain else None
        if streamed:
            right(table, f"{streamed} /\nstreaming")
        for shape in _unique(row["shape"] for row in rows):
            found = {(row["norm"], row["residual"]): row for row in rows if row["shape"] == shape}
            first = next(iter(found.values()))
            cells = [_kernel_ratio(found[variant]) for variant in variants]
            if streamed:
                cells.append(f"{found[streamed, False]['streaming']['median']:.2f}")
            floor = first["floor"]["median"] / first["copies"] * 2.5
            table.add_row(shape, f"{first['megabytes']:.1f}", f"{floor:.3g}", *cells)
        passes = "eight" if layout == "NHWC" else "five"
        streaming = f"streaming: {passes} passes over the same four tensors instead of copies of two\n"
        table.caption = (
            "the floor shown is 2.5 copies; with a residual it is 3.5 (none) or 4 (relu, hardswish)\n"
            + (streaming if streamed else "")
            + busy(result)
        )
        tables.append(table)

    return pages(*tables, *(_kernel_summaries(result["summaries"], layout) for layout in layouts))


def _kernel_summaries(summaries: Sequence[Result], layout: str) -> Table:
    table = table_of(f"Kernels alone, {layout}: summary", "tensors", "what")
    for heading in ("how\nmany", "geometric\nmean", "worst", "limit"):
        right(table, heading)
    table.add_column("worst at", no_wrap=True)
    for heading in ("streaming\nmean", "\nworst"):
        right(table, heading)
    for summary in (summary for summary in summaries if summary["layout"] == layout):
        size = "≥ 25 MB" if summary["size"] == "large" else "1–25 MB"
        what = summary["what"] if summary["dtype"] == "float32" else "bfloat16 / float32"
        limit = "" if summary["limit"] is None else f"{summary['limit']:.2f}"
        figures = f"{summary['tensors']}", f"{summary['geometric_mean']:.2f}"
        worst = mark(f"{summary['worst']:.2f}", missed=summary["holds"] is False)
        streaming = [
            "" if summary[key] is None else f"{summary[key]:.2f}" for key in ("streaming_mean", "streaming_worst")
        ]
        table.add_row(size, what, *figures, worst, limit, summary["worst_shape"], *streaming)
    return table


def layers(result: Result) -> list[RenderableType]:
    """One table for each environment and norm, both layouts side by side, and one of summaries."""
    tables: list[Table] = []
    rows = result["rows"]
    for environment in _unique(row["environment"] for row in rows):
        for norm in _unique(row["norm"] for row in rows):
            chosen = [row for row in rows if row["environment"] == environment and row["norm"] == norm]
            if chosen:
                tables.append(_layer_table(environment, norm, chosen, busy(result)))

    return pages(*tables, *_layer_summaries(result["summaries"]))


def _layer_summaries(summaries: Sequence[Result]) -> list[Table]:
    return [
        _layer_summaries_of(environment, layout, chosen)
        for environment in _unique(summary["environment"] for summary in summaries)
        for layout in _unique(summary["layout"] for summary in summaries)
        if (chosen := [one for one in summaries if (one["environment"], one["layout"]) == (environment, layout)])
    ]


def _layer_summaries_of(environment: str, layout: str, summaries: Sequence[Result]) -> Table:
    contenders = [name for name in HEADINGS if any(summary["contender"] == name for summary in summaries)]
    title = f"Layers, {layout}, {environment} environment: geometric mean of their time / ours, and the worst"
    table = table_of(title, "norm")
    for contender in contenders:
        right(table, HEADINGS[contender])
        right(table, "\nworst")
    found = {(summary["norm"], summary["contender"]): summary for summary in summaries}
    for norm in _unique(norm for norm, _ in found):
        cells = []
        for contender in contenders:
            summary = found.get((norm, contender))
            cells += ["", ""] if summary is None else _layer_summary(summary)
        table.add_row(norm, *cells)
    if environment == "tuned":
        table.caption = (
            "goals: 3 beside Paddle and 2.5 beside the better torch layout for batch norm and an activation,\n"
            f"2 beside Paddle for every other norm, 1 for the worst; {MISSED} missed"
        )
    return table


def _layer_summary(summary: Result) -> list[str]:
    goal = summary["goal"] if summary["environment"] == "tuned" else None
    mean = summary["geometric_mean"]
    missed = goal is not None and not mean >= goal
    return [mark(f"{mean:.2f}", missed=missed), f"[dim]{_ratio(summary['worst'])}[/]"]


def _layer_table(environment: str, norm: str, rows: Sequence[Result], quiet: str) -> Table:
    layouts = _unique(row["layout"] for row in rows)
    contenders = [name for name in HEADINGS if name != "better torch" and any(name in row["ratios"] for row in rows)]
    table = table_of(f"{TITLES[norm]} in a model, {environment} environment", "shape")
    table.show_footer = True
    table.columns[0].footer = "geometric mean"
    for layout in layouts:
        right(table, f"{layout}\nours ms")
        for contender in contenders:
            ratios = [row["ratios"][contender]["median"] for row in rows if row["layout"] == layout]
            right(table, HEADINGS[contender])
            table.columns[-1].footer = _ratio(geometric_mean(ratios))
    for shape in _unique(row["shape"] for row in rows):
        found = {row["layout"]: row for row in rows if row["shape"] == shape}
        cells = []
        for layout in layouts:
            cells.append(_time(found[layout]["times"]["flatwater"]["median"]))
            cells += [_ratio(found[layout]["ratios"][contender]["median"]) for contender in contenders]
        table.add_row(shape, *cells)
    table.caption = f"others: their time / ours, above 1 ours is faster; {MISSED} ours is slower\n{quiet}"
    return table


def memory(result: Result) -> list[RenderableType]:
    """The peak of a step, page faults in the steady state, and the pool."""
    peaks = table_of("Peak of resident memory in one training step", "shape", "graph")
    for heading in ("tensor\nMB", "Paddle\nMB", "ours\nMB", "saved,\ntensors"):
        right(peaks, heading)
    for row in result["peaks"]:
        sizes = [f"{row[name] / 1e6:.0f}" for name in ("tensor", "stock", "flatwater")]
        graph = f"{row['blocks']} × {row['neighbours']}, {row['norm']}"
        peaks.add_row(row["shape"], graph, *sizes, mark(f"{row['saved']:.2f}", missed=not row["holds"]))
    peaks.caption = (
        f"saved: (Paddle - ours) / tensor; {MISSED} less than one for each scale block without a residual, "
        "or less than none"
    )

    faults = table_of("Page faults per training step in the steady state", "shape", "layout", "environment")
    for heading in ("without\nnorm", "with\nPaddle's", "with\nours", "ours\nalone"):
        right(faults, heading)
    for row in result["faults"]:
        counts = [f"{row[name]:.0f}" for name in ("bare", "stock", "flatwater")]
        own = mark(f"{row['own']:.1f}", missed=not row["holds"])
        faults.add_row(row["shape"], row["layout"], row["environment"], *counts, own)

    pool = table_of("The pool after steps on all of these, default environment", "what")
    right(pool, "")
    for name, value in result["pool"].items():
        pool.add_row(name.replace("_", " "), str(value) if name in ("hits", "misses") else f"{value / 1e6:.0f} MB")
    return pages(peaks, faults, pool)


def accuracy(result: Result) -> list[RenderableType]:
    """Errors of everyone beside each other, and whether bits depend on threads."""
    table = table_of("Error against float64: RMS of the difference / RMS of the value", "data", "result")
    names = list(result["rows"][0]["rms"])
    for name in names:
        right(table, {"flatwater": "ours", "paddle": "Paddle", "torch": "PyTorch"}[name])
    case = None
    for row in result["rows"]:
        if case not in (None, row["case"]):
            table.add_section()
        cells = [_error(row["rms"][name]) for name in names]
        cells[0] = mark(cells[0], missed=not row["best"])
        table.add_row("" if case == row["case"] else row["case"], row["result"], *cells)
        case = row["case"]
    table.caption = f"{MISSED} ours is not the smallest; – no number came back"

    bits = result["bits"]
    differing = [f"{'x'.join(map(str, row['shape']))} {row['layout']}" for row in bits if not row["same"]]
    verdict = f"[red]differ at {', '.join(differing)} {MISSED}[/]" if differing else "are the same"
    return [*pages(table), f"Bits for 1, 2, 3 and 8 threads {verdict} ({len(bits)} tensors)."]


def host(result: Result) -> list[RenderableType]:
    """One table: milliseconds of a training step, and the two ratios."""
    table = table_of("Training steps of whole networks, and how many times as fast as untuned Paddle's", "network")
    for heading in ("untuned\nms", "flatwater\nrun, ms", "with our\nlayers, ms", "flatwater\nrun", "with our\nlayers"):
        right(table, heading)
    for row in result["rows"]:
        times = [f"{row[name]['median']:.0f}" for name in ("default", "tuned", "flatwater")]
        tuned = mark(f"{row['tuned_speedup']['median']:.2f}", missed=not row["holds"])
        table.add_row(row["model"], *times, tuned, f"{row['flatwater_speedup']['median']:.2f}")
    table.caption = f"the goal of flatwater run alone is {GOAL:g}\n{busy(result)}"
    return pages(table)


def _kernel_ratio(row: Result) -> str:
    """The limits are for ReLU without a residual; tiny tensors have none."""
    ratio, limit = row["ratio"]["median"], LIMITS.get(row["size"], math.inf)
    held = row["norm"] == "relu" and not row["residual"]
    return mark(f"{ratio:.2f}", missed=held and ratio > limit)


def _ratio(ratio: float) -> str:
    return "–" if math.isnan(ratio) else mark(f"{ratio:.2f}", missed=ratio < 1)


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 10 else f"{milliseconds:.1f}"


def _error(error: float) -> str:
    return "–" if math.isnan(error) else f"{error:.1e}"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
