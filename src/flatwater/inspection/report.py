"""What was found in the file of an exported model."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

__all__ = ["Inspection", "NormNode"]


@dataclass(frozen=True)
class NormNode:
    """A norm in the file.

    Attributes:
        name: what the file calls it.
        kind: ``batch_norm``, ``instance_norm``, ``group_norm``, ``layer_norm`` or ``rms_norm``.
        channels: None if the file does not say.
        reads: the operation that feeds it, or the input.
        read_by: every operation that reads what it writes.
        batch_statistics: for a batch norm that computes with the statistics of its input, why; else None.
        folds_into: the operation that could take it up; None if it could not be folded.
        reason: why not; None if it could.
    """

    name: str
    kind: str
    channels: int | None
    reads: str
    read_by: tuple[str, ...]
    batch_statistics: str | None
    folds_into: str | None
    reason: str | None


@dataclass(frozen=True)
class Inspection:
    """The norms left in a file. Prints as a table, in plain text and in ``rich``.

    Attributes:
        path: the file.
        form: its format, as words.
        operations: how many operations it holds in all.
        norms: in the order of the file.
    """

    path: str
    form: str
    operations: int
    norms: list[NormNode]

    @property
    def foldable(self) -> list[NormNode]:
        """Norms that a fold would remove."""
        return [norm for norm in self.norms if norm.folds_into is not None]

    @property
    def training(self) -> list[NormNode]:
        """Batch norms that compute with the statistics of the batch, as in training."""
        return [norm for norm in self.norms if norm.batch_statistics is not None]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: the fields, and how many norms there are of each sort."""
        return {
            "path": self.path,
            "form": self.form,
            "operations": self.operations,
            "foldable": len(self.foldable),
            "training": len(self.training),
            "norms": [asdict(norm) for norm in self.norms],
        }

    def summary(self) -> str:
        """One line."""
        many = f"{len(self.norms)} norm{'s' * (len(self.norms) != 1)} in {self.operations} operations"
        return (
            f"{self.path}: {self.form}, {many}, {len(self.foldable)} of them foldable, "
            f"{len(self.training)} in training mode"
        )

    def __rich__(self) -> Group:
        summary = f"[bold]{escape(self.summary())}[/]"
        if not self.norms:
            return Group(summary)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        # A column that says the same in every row would only narrow the others.
        kinds = {norm.kind for norm in self.norms} != {"batch_norm"}
        for heading in ("norm", *["kind"] * kinds, "channels", "reads", "verdict"):
            table.add_column(heading, justify="right" if heading == "channels" else "left", overflow="fold")
        for norm in self.norms:
            if norm.batch_statistics is not None:
                verdict = f"[red]TRAINING[/] {escape(norm.batch_statistics)}"
            elif norm.folds_into is not None:
                into = "it" if norm.folds_into == norm.reads else norm.folds_into
                verdict = f"[yellow]foldable[/] into {escape(into)}"
            else:
                verdict = f"stays: {escape(norm.reason or '')}"
            channels = "–" if norm.channels is None else str(norm.channels)
            table.add_row(escape(norm.name), *[norm.kind] * kinds, channels, escape(norm.reads), verdict)
        return Group(summary, table)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=160, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip()
