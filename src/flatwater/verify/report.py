"""The table of a verification."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from flatwater.rounding import MOST_NOISE, NOISE_FACTOR

__all__ = ["Divergence", "Finding", "VerifyReport", "VerifyRow", "number", "share"]


class Finding(NamedTuple):
    """Something that makes forms of a model disagree, whatever the inputs here show of it.

    Attributes:
        layer: path of the layer, or name of the node.
        problem: what is wrong, and what to do.
    """

    layer: str
    problem: str


class Divergence(NamedTuple):
    """Where a form that failed starts to compute something else.

    Attributes:
        form: which form: the first that failed.
        layer: the first norm layer at which it does; None if that is not known.
        words: what was found, or why nothing was.
    """

    form: str
    layer: str | None
    words: str


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
        argmax: the share of places at which the largest class is the same, see
            :func:`~flatwater.verify.compare.same_argmax`; None for outputs without classes. It does not decide.
        decoded: the share of samples that are decoded alike; None if nothing was to be decoded.
        broken: whether the form did not load or run at all.
    """

    form: str
    batch: int
    max_abs: float | None
    max_rel: float | None
    tolerance: float
    passed: bool
    note: str | None = None
    argmax: float | None = None
    decoded: float | None = None
    broken: bool = False


@dataclass(frozen=True)
class VerifyReport:
    """The same inputs through every form of a model. Prints as a table, in plain text and in ``rich``.

    Attributes:
        rows: form by form.
        reference: what the forms were compared with.
        findings: what is known to be wrong with the model.
        noise: how far the reference moves, relative to the scale of its outputs, when its inputs move by one unit in
            the last place; None where nothing was off, or that is within the tolerance.
        diverging: where a form that failed starts to compute something else; None if no number is off, or nothing
            could be looked into.
        left_out: forms that were not to be compared.
    """

    rows: list[VerifyRow]
    reference: str = "the live model"
    findings: list[Finding] = field(default_factory=list)
    diverging: Divergence | None = None
    noise: float | None = None
    left_out: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there are rows, all of them passed, and nothing was found besides."""
        return bool(self.rows) and all(row.passed for row in self.rows) and not self.findings

    @property
    def failures(self) -> list[VerifyRow]:
        """The rows that did not pass."""
        return [row for row in self.rows if not row.passed]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: ``passed`` and the fields; rows and findings as dicts."""
        return {
            "passed": self.passed,
            "reference": self.reference,
            "rows": [asdict(row) for row in self.rows],
            "findings": [finding._asdict() for finding in self.findings],
            "noise": self.noise if self.noise is not None and math.isfinite(self.noise) else None,
            "diverging": None if self.diverging is None else self.diverging._asdict(),
            "left_out": self.left_out,
        }

    @property
    def rounding(self) -> str | None:
        """What there is to say of a model that multiplies rounding; None for others."""
        if self.noise is None:
            return None
        what = f"moves by {number(self.noise)} of its scale when its inputs move by one unit in the last place"
        if NOISE_FACTOR * self.noise > MOST_NOISE:
            return f"the model multiplies rounding, and {what}: these inputs prove nothing; give others, or a tolerance"
        return f"the model multiplies rounding, and {what}: its forms may be off by {NOISE_FACTOR:g} times that"

    @property
    def remarks(self) -> list[str]:
        """What there is to say besides numbers, each once."""
        remarks = [f"{row.form}: {row.note}" for row in self.rows if row.note]
        remarks += [f"{finding.layer}: {finding.problem}" for finding in self.findings]
        remarks += [self.rounding] if self.rounding else []
        remarks += [f"{self.diverging.form}: {self.diverging.words}"] if self.diverging else []
        remarks += [f"{form}: not compared, as was asked for" for form in self.left_out]
        return list(dict.fromkeys(remarks))

    def summary(self) -> str:
        """One line."""
        if self.failures:
            verdict = f"{len(self.failures)} of {len(self.rows)} comparisons fail"
        elif self.passed:
            verdict = "all agree"
        else:
            verdict = "not to be shipped as it is" if self.rows else "there is none"
        within = ", ".join(f"{one:g}" for one in sorted({row.tolerance for row in self.rows}))
        return f"Every form against {self.reference}" + f", within {within}" * bool(within) + f": {verdict}"

    def __rich__(self) -> Group:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        shares = [name for name in ("argmax", "decoded") if any(getattr(row, name) is not None for row in self.rows)]
        table.add_column("form", overflow="fold")
        for heading in ("batch", "max |Δ|", "relative", *shares):
            table.add_column(heading, justify="right", overflow="fold")
        table.add_column("")
        above = ""
        for row in self.rows:
            cells = ["" if row.form == above else row.form, str(row.batch)]
            cells += [number(row.max_abs), number(row.max_rel)]
            cells += [share(getattr(row, name)) for name in shares]
            table.add_row(*cells, "[green]pass[/]" if row.passed else "[bold red]FAIL[/]")
            above = row.form
        remarks = Table.grid(padding=(0, 1))
        for remark in self.remarks:
            remarks.add_row(" –", Text(remark))
        return Group(Text(self.summary(), style="bold"), table, *[remarks] * bool(self.remarks))

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip()


def share(value: float | None) -> str:
    """As a percentage, rounded down so that 100% means all of them."""
    return "–" if value is None else f"{math.floor(value * 1000 + 1e-9) / 10:g}%"


def number(value: float | None) -> str:
    """Two significant digits, and 0 for what is exactly that."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.1e}" if value else "0"
