"""The whole job, in order: train, evaluate, fold, export, verify, read samples, report.

``flatwater ocr train`` runs it. :mod:`flatwater.recipes.ocr.results` lists what it leaves in the run's folder.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import paddle
from PIL import Image
from rich.console import Console
from rich.table import Table

import flatwater
import flatwater.paddle as fw
from flatwater import kernels
from flatwater.errors import CheckpointError, DataError
from flatwater.files import write_whole
from flatwater.host import missing
from flatwater.paddle.monitor import NormMonitor
from flatwater.recipes.ocr import config as configs
from flatwater.recipes.ocr import report, results
from flatwater.recipes.ocr.data import WIDTH_MULTIPLE, DataSource, Sample
from flatwater.recipes.ocr.evaluate import Evaluation, evaluate
from flatwater.recipes.ocr.interruption import interruption
from flatwater.recipes.ocr.model import Recognizer, build
from flatwater.recipes.ocr.preprocess import HEIGHT, pad
from flatwater.recipes.ocr.ranks import World
from flatwater.recipes.ocr.read import Reader, write_meta
from flatwater.recipes.ocr.train import CHECKPOINT, train
from flatwater.verify import VerifyReport

__all__ = ["run"]

MODEL = Path("model", "recognizer")
"""Of a run's folder: what the exported files' names begin with."""

_SHOWN_SAMPLES = 24
_EXAMPLE_LINES = 8  # real lines on which folding and every exported form are proven
_OWN_FILES = ("config.yaml", "metrics.json", "history.json", "norms.json", "fold.json", "verification.json")
_OWN_FOLDERS = ("samples", "model", "checkpoint")


def run(path: Path | None, overrides: Sequence[str], folder: Path, *, resume: bool = False) -> bool:
    """Do the whole job.

    Args:
        path: a YAML configuration; None for the defaults, or, with ``resume``, for those of the run.
        overrides: ``KEY=VALUE`` settings that go over it.
        folder: where everything goes. A former run in it is replaced.
        resume: go on from the folder's checkpoint instead.

    Where Paddle's launcher started several processes, all of them train, and rank 0 alone writes and reports; with
    more than one host, ``folder`` is on a file system that they share, if the run is to be resumed.

    Returns:
        Whether it came to its end; not if Ctrl-C ended training, which can then be resumed.

    Raises:
        FlatwaterError: see its subclasses; what can be checked is checked before anything is written.
        OSError: something could not be written.
    """
    if resume and not (folder / CHECKPOINT).is_file():
        raise CheckpointError(f"{folder / CHECKPOINT}: is not there, so no run can be gone on with; leave out --resume")
    if resume and path is None:
        path = folder / "config.yaml"
    config = configs.load(path, overrides)
    world = World.join(config)
    data = DataSource(config)
    _, policy = build(config, data.alphabet.classes, world.size)  # trained is another; this is to be shown, or refused
    if not world.first:
        return train(config, folder, data, resume=resume, console=Console(quiet=True), world=world).completed
    console = Console()
    if not resume:  # a run that is gone on with keeps its configuration: training refuses another
        _clear(folder)
        write_whole(folder / "config.yaml", config.to_yaml())
    batch = results.Batch.of(config, world.size)
    console.print(
        f"[bold]{len(data.alphabet)} characters[/], {config.train.steps} steps, "
        f"norm {config.norm.kind}, seed {config.seed} → {folder}",
        highlight=False,
    )
    if world.size > 1:
        console.print(str(batch), highlight=False)
    if policy is not None:
        console.print(str(policy), highlight=False, markup=False, soft_wrap=True)

    clock = _Clock(console)
    with interruption() as interrupted:
        with clock.phase("training"):
            monitor = _Monitor(folder / "norms.json", every=config.train.monitor_every, resume=resume)
            watch = None if config.norm.kind == "none" else monitor.watch
            trained = train(
                config,
                folder,
                data,
                resume=resume,
                console=console,
                on_step=watch,
                world=world,
                interrupted=interrupted,
            )
            monitor.save()
            results.save(folder / "history.json", trained.history)
        if not trained.completed:
            report.write(folder)
            console.print(f"stopped; go on with: flatwater ocr train --resume --output {folder}", highlight=False)
            return False

    with clock.phase("evaluation"):
        seen_samples = data.test_set()
        unseen_samples = data.test_set(unseen_font=True) if data.has_unseen_font else []
        seen = evaluate(trained.model, seen_samples, data.alphabet)
        unseen = evaluate(trained.model, unseen_samples, data.alphabet) if unseen_samples else None
    with clock.phase("fold, export, verify"):
        console.print(_export(trained.model, folder, seen_samples, data.alphabet.characters))
    with clock.phase("reading samples"):
        _read(folder, seen_samples, unseen_samples)
    _save_metrics(folder, seen, unseen, batch, clock.seconds)
    page = report.write(folder)
    _summarise(console, folder, page, seen, unseen, clock.seconds)
    return True


class _Clock:
    """How long each phase took; says when one is over."""

    def __init__(self, console: Console) -> None:
        self.seconds: dict[str, float] = {}
        self._console = console

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        self._console.print(f"{name}: {self.seconds[name]:.1f} s", highlight=False)


class _Monitor:
    """The NormMonitor of a model that exists only once training has begun."""

    def __init__(self, path: Path, *, every: int, resume: bool) -> None:
        self._path = path
        self._every = every
        self._resume = resume
        self._monitor: NormMonitor | None = None

    def watch(self, step: int, model: Recognizer) -> contextlib.AbstractContextManager[None]:
        """What training runs each forward pass in."""
        if self._monitor is None:
            self._monitor = NormMonitor(model, every=self._every)
            if self._resume and self._path.is_file():
                self._monitor.load(self._path, before=step)
        return self._monitor.sampling(step)

    def save(self) -> None:
        """Write the record, if a step was taken."""
        if self._monitor is not None:
            self._monitor.save(self._path)


def _clear(folder: Path) -> None:
    """Make room for a new run, but only where a former one was."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder}: is a file; give --output a folder")
    if any(folder.iterdir()) and not (folder / "config.yaml").is_file():
        raise DataError(f"{folder}: holds files but no run; give --output a new or empty folder")
    for name in (*_OWN_FILES, "report.html"):
        (folder / name).unlink(missing_ok=True)
    for name in _OWN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _export(model: Recognizer, folder: Path, samples: Sequence[Sample], alphabet: str) -> VerifyReport:
    """Write the folded model in both formats; nothing of it where one of them does not compute what the model does."""
    lines = pad([sample.image() for sample in samples[:_EXAMPLE_LINES]], WIDTH_MULTIPLE)
    (folder / MODEL).parent.mkdir(exist_ok=True)
    exported = fw.export(
        model,
        folder / MODEL,
        [paddle.static.InputSpec([None, 1, HEIGHT, None], "float32", "images")],
        example_inputs=[paddle.to_tensor(lines)],
    )
    write_meta(folder / MODEL, alphabet)
    if exported.fold is not None:
        results.save(folder / "fold.json", results.Fold.model_validate(exported.fold.as_dict()))
    results.save(folder / "verification.json", results.Verification.model_validate(exported.verification.as_dict()))
    return exported.verification


def _read(folder: Path, seen: Sequence[Sample], unseen: Sequence[Sample]) -> None:
    """Read some test lines the way a user would: as image files, with the exported model."""
    half = _SHOWN_SAMPLES // 2 if unseen else _SHOWN_SAMPLES
    shown = [*seen[:half], *unseen[:half]]
    (folder / "samples").mkdir(exist_ok=True)
    files = []
    for number, sample in enumerate(shown):
        file = folder / "samples" / f"{number:02}.png"
        if isinstance(sample.picture, Path):
            with Image.open(sample.picture) as picture:
                picture.convert("L").save(file)
        else:
            Image.fromarray(sample.picture).save(file)
        files.append(file)
    readings = Reader(folder).read(files)
    results.save(
        folder / "samples" / "samples.json",
        [
            results.Sample(
                file=reading.path.name,
                truth=sample.text,
                read=reading.text,
                confidence=reading.confidence,
                font=sample.font,
            )
            for sample, reading in zip(shown, readings, strict=True)
        ],
    )


def _save_metrics(
    folder: Path, seen: Evaluation, unseen: Evaluation | None, batch: results.Batch, seconds: dict[str, float]
) -> None:
    metrics = results.Metrics(
        char_accuracy=seen.char_accuracy,
        char_accuracy_unseen_font=None if unseen is None else unseen.char_accuracy,
        line_accuracy=seen.line_accuracy,
        line_accuracy_unseen_font=None if unseen is None else unseen.line_accuracy,
        test_lines=seen.lines,
        distinct_characters=seen.distinct_characters,
        batch=batch,
        seconds=seconds | {"total": sum(seconds.values())},
        environment=_environment(),
    )
    results.save(folder / "metrics.json", metrics)


def _environment() -> dict[str, str]:
    return {
        "processor": _processor(),
        "kernels": f"{kernels.isa()}, {kernels.threads()} threads",
        "flatwater": flatwater.__version__,
        "paddlepaddle": paddle.__version__,
        "onnxruntime": version("onnxruntime"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "allocator": "default" if any("MALLOC" in setting.variable for setting in missing(os.environ)) else "tuned",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _summarise(
    console: Console, folder: Path, page: Path, seen: Evaluation, unseen: Evaluation | None, seconds: dict[str, float]
) -> None:
    table = Table("test set", "lines", "characters right", "lines right", title="held-out words")
    for name, result in (("fonts of training", seen), ("unseen font", unseen)):
        if result is not None:
            shares = (report.percent(result.char_accuracy), report.percent(result.line_accuracy))
            table.add_row(name, str(result.lines), *shares)
    console.print(table)
    console.print(
        f"{seen.distinct_characters} distinct characters tested; {sum(seconds.values()):.0f} s in all\n"
        f"report: {page}\nread an image of your own: flatwater ocr read IMAGE --model {folder}",
        highlight=False,
        soft_wrap=True,
    )
