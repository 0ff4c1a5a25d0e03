"""The table of a verification."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["VerifyReport", "VerifyRow"]


@dataclass(frozen=True)
class VerifyRow:
    """One form of the model at one batch size, against the live model.

    Attributes:
        form: which form.
        batch: batch size.
        max_abs: largest difference over all outputs; None if nothing could be compared.
        max_rel: largest difference within an output divided by the live output's largest magnitude.
        tolerance: what ``max_rel`` may be.
        passed: whether it is.
        note: why nothing could be compared, else None.
    """

    form: str
    batch: int
    max_abs: float | None
    max_rel: float | None
    tolerance: float
    passed: bool
    note: str | None = None


@dataclass(frozen=True)
class VerifyReport:
    """The same inputs through every form of a model. Prints as a table, in plain text and in ``rich``."""

    rows: list[VerifyRow]

    @property
    def passed(self) -> bool:
        """Whether there are rows, and all of them passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> list[VerifyRow]:
        """The rows that did not pass."""
        return [row for row in self.rows if not row.passed]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: ``passed`` and ``rows``, each with the fields of :class:`VerifyRow`."""
        return {"passed": self.passed, "rows": [row.__dict__.copy() for row in self.rows]}

    def __rich__(self) -> Table:
        reasons = {f"{row.form}: {row.note}": None for row in self.rows if row.note}  # each once, in order
        table = Table(title="Every form against the live model", caption="\n".join(map(escape, reasons)) or None)
        for heading in ("form", "batch", "max |Δ|", "relative", "tolerance", ""):
            table.add_column(heading, justify="left" if heading in ("form", "") else "right", overflow="fold")
        for row in self.rows:
            verdict = "[green]pass[/]" if row.passed else "[red]FAIL[/]"
            table.add_row(
                row.form, str(row.batch), _number(row.max_abs), _number(row.max_rel), f"{row.tolerance:.0e}", verdict
            )
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.1e}"
