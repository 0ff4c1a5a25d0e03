"""What converting norm layers did."""

from __future__ import annotations

from dataclasses import dataclass, field

from flatwater.surgery.report import ChangeReport

__all__ = ["ConvertReport"]


@dataclass
class ConvertReport(ChangeReport):
    """What :func:`convert` or :func:`revert` did.

    Attributes:
        notes: path of a changed layer -> what its new kind could not hold, or begins without.
    """

    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"  {path}: {note}" for path, note in self.notes.items())])
