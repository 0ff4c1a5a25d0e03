"""Whether a norm of an exported model could be folded, by what feeds it and who else reads that."""

from __future__ import annotations

from typing import NamedTuple

from flatwater.inspection.graph import Graph, Linear, Norm, Operation, Shift
from flatwater.inspection.report import Inspection, NormNode

__all__ = ["Way", "find_way", "inspect_graph"]


class Way(NamedTuple):
    """How a batch norm can go.

    Attributes:
        target: what takes it up: a linear operation or another batch norm.
        shifts: sums with constants between the two, from the target to the norm; they take up its share too.
        after: the norm comes after the target; False: before it.
    """

    target: Operation
    shifts: tuple[tuple[Operation, Shift], ...]
    after: bool


def inspect_graph(path: str, form: str, graph: Graph) -> Inspection:
    """The report on all norms of a graph, which is the file ``path`` in the format ``form``."""
    nodes = []
    for operation in graph.operations:
        norm = operation.part
        if not isinstance(norm, Norm):
            continue
        way = find_way(graph, operation, norm)
        writer = graph.writer(norm.data)
        readers = graph.readers(operation.writes[0])
        nodes.append(
            NormNode(
                name=operation.name,
                kind=norm.kind,
                channels=norm.channels,
                reads=str(writer) if writer is not None else f"input {norm.data}",
                read_by=tuple(map(str, readers))
                + (("output of the model",) if operation.writes[0] in graph.results else ()),
                batch_statistics=norm.batch_statistics,
                folds_into=str(way.target) if isinstance(way, Way) else None,
                reason=way if isinstance(way, str) else None,
            )
        )
    return Inspection(path, form, len(graph.operations), nodes)


def find_way(graph: Graph, operation: Operation, norm: Norm) -> Way | str:
    """How the operation, which is this norm, could be folded, or why it cannot be."""
    if norm.kind != "batch_norm":
        return "its statistics are those of what it reads"
    if norm.batch_statistics is not None:
        return norm.batch_statistics
    computed = [name for name in norm.parameters if name not in graph.constants]
    if computed:
        return f"its parameter {computed[0]} is no constant"
    if norm.axis is None:
        return "which axis its channels lie on is not known"
    before = _before(graph, norm)
    if isinstance(before, Way):
        return before
    behind = _behind(graph, operation, norm)
    return behind if isinstance(behind, Way) else f"{before}, {behind}"


def _before(graph: Graph, norm: Norm) -> Way | str:
    tensor = norm.data
    shifts: list[tuple[Operation, Shift]] = []
    while True:
        writer = graph.writer(tensor)
        if writer is None:
            return "it reads an input of the model"
        part = writer.part
        if part is None or (isinstance(part, Norm) and (part.kind != "batch_norm" or part.batch_statistics)):
            return f"it reads what {writer} writes"
        if part.axis != norm.axis and not (isinstance(part, Shift) and part.axis is None):
            return f"the channels of {writer} lie on another axis, or where is not known"
        if tensor in graph.results:
            return f"what {writer} writes is an output too"
        others = [str(reader) for reader in graph.readers(tensor)]
        if len(others) > 1:
            return f"what {writer} writes is read by {' and '.join(others)}"
        if isinstance(part, Shift):
            shifts.insert(0, (writer, part))
            tensor = part.data
        elif isinstance(part, Norm):
            return f"a sum stands between {writer} and it" if shifts else Way(writer, (), after=True)
        elif part.weight not in graph.constants:
            return f"the weight of {writer} is no constant"
        else:
            return Way(writer, tuple(shifts), after=True)


def _behind(graph: Graph, operation: Operation, norm: Norm) -> Way | str:
    tensor = operation.writes[0]
    if tensor in graph.results:
        return "and what it writes is an output"
    readers = graph.readers(tensor)
    if len(readers) != 1:
        return f"and what it writes is read by {' and '.join(map(str, readers)) or 'nothing'}"
    reader = readers[0]
    part = reader.part
    if not isinstance(part, Linear) or part.data != tensor or part.weight not in graph.constants:
        return f"and what it writes is read by {reader}"
    if part.axis != norm.axis:
        return f"and the channels of {reader} lie on another axis"
    if not part.even:
        return f"and {reader} behind it pads with zeros or overlaps"
    return Way(reader, (), after=False)
