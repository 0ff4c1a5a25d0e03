"""How far training has come: a live line on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import time
from types import TracebackType

import rich.progress
from rich.console import Console

from flatwater.recipes.ocr.results import Evaluation, TrainPoint

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A context in which training shows its numbers.

    Args:
        console: where.
        steps: how many steps the whole training has.
        step: how many of them are done.
    """

    def __init__(self, console: Console, steps: int, step: int = 0) -> None:
        self._console = console
        self._steps = steps
        self._step = self._first = step
        self._began = time.monotonic()
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._numbers = ""
        self._accuracy = ""
        self._live = rich.progress.Progress(
            rich.progress.TextColumn("step"),
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._live.add_task("training", total=steps, completed=step, numbers="")

    def __enter__(self) -> Progress:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def advance(self) -> None:
        """One more step is done."""
        self._step += 1
        self._live.update(self._task, advance=1, numbers=self._text())

    def show(self, point: TrainPoint) -> None:
        """The latest of the training numbers."""
        rates = f"lr {point.lr:.1e}  {point.lines_per_second:.0f} lines/s"
        self._numbers = f"loss {point.loss:.3f}  {rates}"
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._print(point.step)

    def show_accuracy(self, evaluation: Evaluation) -> None:
        """The latest evaluation."""
        self._accuracy = f"accuracy {evaluation.char_accuracy:.1%}"
        if not self._console.is_terminal:
            self._print(evaluation.step)

    def _text(self) -> str:
        return "  ".join(part for part in (self._numbers, self._accuracy) if part)

    def _print(self, step: int) -> None:
        elapsed = time.monotonic() - self._began
        left = elapsed / max(1, step - self._first) * (self._steps - step)
        line = f"step {step}/{self._steps}  {self._text()}  {elapsed:.0f} s, {left:.0f} s left"
        self._console.print(line, highlight=False, soft_wrap=True)
