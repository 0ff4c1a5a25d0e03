"""What the tables of all parts are made of, for a terminal of 100 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from benchmarks.round_trip import APART
from benchmarks.timing import QUIET

__all__ = ["MISSED", "Result", "busy", "mark", "pages", "right", "table_of"]

Result = Mapping[str, Any]

MISSED = "!"
"""Stands behind what misses its limit."""


def table_of(title: str, *headings: str) -> Table:
    """A table without rows; columns of sizes and times are set to the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    for heading in headings:
        if heading in ("MB", "floor\nms"):
            right(table, heading)
        else:
            table.add_column(heading, no_wrap=True)
    return table


def pages(*tables: Table) -> list[RenderableType]:
    """The tables with their titles and captions around them, where they are not folded to the table's width."""
    found: list[RenderableType] = []
    for table in tables:
        title, caption = table.title, table.caption
        table.title = table.caption = None
        parts: list[RenderableType] = [f"\n[bold]{title}[/]", table]
        if caption:
            parts.append(f"[dim]{caption}[/]\n")
        found.append(Group(*parts))
    return found


def right(table: Table, heading: str) -> None:
    """A column of numbers more."""
    table.add_column(heading, justify="right", no_wrap=True)


def mark(text: str, *, missed: bool) -> str:
    """The text, red and with :data:`MISSED` where it misses its limit."""
    return f"[bold red]{text}{MISSED}[/]" if missed else text


def busy(result: Result) -> str:
    """Whether the machine was quiet enough for what was measured, and how far apart its processors were meanwhile."""
    text = f"medians of rounds; other processes and machines kept {result['others']:.2f} processors busy"
    if result["others"] > QUIET:
        text += f": [bold red]measure again when it is quiet {MISSED}[/]"
    if trips := [trip for trip in result.get("round_trips", ()) if not math.isnan(trip)]:
        text += f"\na byte went to another processor and back in {min(trips):.0f} to {max(trips):.0f} ns"
        if max(trips) > APART * min(trips):
            text += ": [bold]moved apart[/], see README.md"
    return text
