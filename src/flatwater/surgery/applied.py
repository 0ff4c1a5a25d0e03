"""What a policy did to each norm layer of a model, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["PolicyEntry", "PolicyReport"]


@dataclass
class PolicyEntry:
    """One norm layer.

    Attributes:
        path: where it is in the model.
        was, kind: the name of its class, before and now.
        done: what was set, and where the policy says so.
        notes: what was asked for and could not be, or will be later.
    """

    path: str
    was: str
    kind: str
    done: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class PolicyReport:
    """Every norm layer of the model, also those that no rule matches. ``str()`` gives a table."""

    entries: list[PolicyEntry] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: ``norms``, a list of what the entries say."""
        return {"norms": [dict(vars(entry)) for entry in self.entries]}

    def __str__(self) -> str:
        changed = sum(bool(entry.done) for entry in self.entries)
        rows = [("layer", "kind", "what was done")]
        for entry in self.entries:
            kind = entry.kind if entry.kind == entry.was else f"{entry.was} -> {entry.kind}"
            lines = [*entry.done, *(f"note: {note}" for note in entry.notes)] or ["nothing"]
            rows += [(entry.path, kind, lines[0]), *(("", "", line) for line in lines[1:])]
        first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
        table = [f"{layer:<{first}}  {kind:<{second}}  {what}" for layer, kind, what in rows]
        return "\n".join([f"policy: {len(self.entries)} norm layers, {changed} changed", *table])
