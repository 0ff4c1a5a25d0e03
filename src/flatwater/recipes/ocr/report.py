"""report.html: what a run did, on one page that needs nothing else, not even a network.

The page is written from the files of the run's folder (:mod:`flatwater.recipes.ocr.results` lists them) and can be
written at any time: a part whose file is missing or damaged says so in its place, as after an interrupted run.
"""

from __future__ import annotations

import base64
import difflib
import itertools
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jinja2
from markupsafe import Markup

import flatwater
from flatwater.errors import DataError
from flatwater.files import write_whole
from flatwater.recipes.ocr import figures
from flatwater.recipes.ocr.results import (
    Fold,
    History,
    LayerNorms,
    Metrics,
    Norms,
    Sample,
    Verification,
    VerificationRow,
    load,
)

__all__ = ["Span", "compare", "percent", "write"]

_T = TypeVar("_T")

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def write(folder: Path) -> Path:
    """Write ``folder/report.html``, whole or not at all.

    Returns:
        Where it is.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: is not the folder of a run; give the one that `flatwater ocr train` wrote")
    page = _environment().get_template("report.html.j2").render(_context(folder))
    return write_whole(folder / "report.html", page)


class Span(NamedTuple):
    """A piece of a line that is ``"same"``, ``"wrong"`` (read as another), ``"missing"`` (not read) or ``"extra"``."""

    kind: str
    text: str


def compare(truth: str, read: str) -> tuple[list[Span], list[Span]]:
    """The truth and what was read, each cut into spans along a longest alignment."""
    of_truth: list[Span] = []
    of_read: list[Span] = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, truth, read, autojunk=False).get_opcodes():
        kinds = {
            "equal": ("same", "same"),
            "replace": ("wrong", "wrong"),
            "delete": ("missing", ""),
            "insert": ("", "extra"),
        }
        for spans, kind, text in zip((of_truth, of_read), kinds[tag], (truth[a:b], read[c:d]), strict=True):
            if text:
                spans.append(Span(kind, text))
    return of_truth, of_read


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "number": _number,
        "count": lambda value: "–" if value is None else f"{value:,}",
        "duration": _duration,
    }
    return environment


def _context(folder: Path) -> dict[str, Any]:
    gaps: dict[str, str] = {}

    def read(name: str, schema: type[_T]) -> _T | None:
        try:
            return load(folder / name, schema)
        except DataError as error:
            gaps[name] = str(error).removeprefix(f"{folder}/")
            return None

    metrics = read("metrics.json", Metrics)
    history = read("history.json", History)
    norms = read("norms.json", Norms)
    verification = read("verification.json", Verification)
    configuration = folder / "config.yaml"
    if not configuration.is_file():
        gaps["config.yaml"] = "config.yaml: is missing; the job writes it when it starts"
    return {
        "version": flatwater.__version__,
        "name": folder.resolve().name,
        "gaps": gaps,
        "metrics": metrics,
        "phases": _phases(metrics),
        "lines_per_second": _lines_per_second(metrics, history),
        "history": history,
        "curves": _curves(history),
        "norms": norms,
        "overview": figures.layer_overview(norms.layers, norms.quantile_levels) if norms else None,
        "layers": [_layer(layer) for layer in norms.layers if layer.samples] if norms else [],
        "samples": _samples(folder, read("samples/samples.json", list[Sample])),
        "verification": verification,
        "forms": _by_form(verification),
        "fold": read("fold.json", Fold),
        "configuration": configuration.read_text(encoding="utf-8", errors="replace")
        if configuration.is_file()
        else None,
    }


def _phases(metrics: Metrics | None) -> list[dict[str, Any]]:
    """The job's phases with their share of the time, for the bar."""
    seconds = {name: value for name, value in metrics.seconds.items() if name != "total"} if metrics else {}
    whole = sum(seconds.values())
    return [{"name": name, "seconds": value, "share": value / whole} for name, value in seconds.items() if whole > 0]


def _lines_per_second(metrics: Metrics | None, history: History | None) -> float | None:
    if metrics is not None and metrics.lines_per_second is not None:
        return metrics.lines_per_second
    rates = [point.lines_per_second for point in history.train if point.lines_per_second is not None] if history else []
    return statistics.median(rates) if rates else None


def _curves(history: History | None) -> dict[str, Markup]:
    """Only those for which there is anything to draw."""
    drawn: dict[str, Markup] = {}
    if history is None:
        return drawn
    if history.train:
        loss = figures.Series([(point.step, point.loss) for point in history.train], smooth=True)
        positive = all(point.loss > 0 for point in history.train)
        drawn["loss"] = figures.curves([loss], label="Training loss over steps", log=positive)
        rated = [(point.step, point.lr) for point in history.train if point.lr is not None]
        if rated:
            drawn["lr"] = figures.curves([figures.Series(rated)], label="Learning rate over steps")
    if history.evaluations:
        seen = [(point.step, point.char_accuracy) for point in history.evaluations]
        unseen = [
            (point.step, point.char_accuracy_unseen_font)
            for point in history.evaluations
            if point.char_accuracy_unseen_font is not None
        ]
        lines = [figures.Series(seen)] + ([figures.Series(unseen, second=True)] if unseen else [])
        drawn["accuracy"] = figures.curves(lines, label="Character accuracy over steps", percent=True)
    return drawn


def _layer(layer: LayerNorms) -> dict[str, Any]:
    last = layer.samples[-1]
    tracked = last.running_mean is not None
    return {
        "path": layer.path or "(the model)",
        "kind": layer.kind,
        "channels": layer.channels,
        "last": last,
        "before": figures.ridges(layer.samples, "before", label=f"{layer.path} before normalization, over steps"),
        "after": figures.ridges(layer.samples, "after", label=f"{layer.path} after normalization, over steps"),
        "mean": _running(layer, "running_mean", "running mean") if tracked else None,
        "variance": _running(layer, "running_variance", "running variance") if tracked else None,
    }


def _running(layer: LayerNorms, statistic: str, words: str) -> Markup:
    return figures.running_statistic(
        layer.samples, statistic, label=f"{layer.path} {words} of the channels, over steps"
    )


def _by_form(verification: Verification | None) -> list[list[VerificationRow]]:
    rows = verification.rows if verification else []
    return [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.form)]


def _samples(folder: Path, samples: list[Sample] | None) -> list[dict[str, Any]]:
    shown = []
    for sample in samples or []:
        truth, read = compare(sample.truth, sample.read)
        shown.append(
            {"sample": sample, "truth": truth, "read": read, "image": _data_uri(folder / "samples", sample.file)}
        )
    return shown


def _data_uri(folder: Path, name: str) -> str | None:
    """The image within the page; None, which the page states, where it is no file of the folder."""
    image = folder / name
    if not image.is_file() or image.resolve().parent != folder.resolve():
        return None
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode("ascii")


def percent(share: float | None) -> str:
    """Rounded down, so that 100% means all of them."""
    return "–" if share is None else f"{int(share * 10_000 + 1e-6) / 100:.2f}%"


def _number(value: float | None) -> str:
    """Three significant digits, or powers of ten where the number is very small or large."""
    if value is None:
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5 or not math.isfinite(value):
        words = f"{value:.3g}" if not 1e3 <= abs(value) < 1e5 else f"{value:,.0f}"
    else:
        digits, exponent = f"{value:.1e}".split("e")
        words = f"{digits}·10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return words.replace("-", "−")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
