"""The graph of an exported model, as far as its norms are concerned; a reader for each format builds it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple, TypeAlias

__all__ = ["Graph", "Linear", "Norm", "Operation", "Part", "Shift"]


class Norm(NamedTuple):
    """An operation that normalizes.

    Attributes:
        kind: ``batch_norm``, ``instance_norm``, ``group_norm``, ``layer_norm`` or ``rms_norm``.
        data: the tensor that it normalizes.
        parameters: γ, β and, of a batch norm, mean and variance, by name; those that it has.
        channels: how many; None if the file does not say.
        axis: the axis of its channels; None if that is not known.
        batch_statistics: why it computes with the statistics of its input although it is a batch norm; None if it
            computes with the running ones.
    """

    kind: str
    data: str
    parameters: tuple[str, ...]
    channels: int | None
    axis: int | None
    batch_statistics: str | None = None


class Linear(NamedTuple):
    """A convolution, or a product with a matrix.

    Attributes:
        data, weight: the tensors that it multiplies.
        axis: the axis of the channels, of what it reads as of what it writes; None if that is not known.
        even: every output sees all taps of the weight: nothing is padded, and no outputs of a transposed
            convolution overlap.
    """

    data: str
    weight: str
    axis: int | None
    even: bool


class Shift(NamedTuple):
    """A sum with a constant that is a single value, or one value for each channel.

    Attributes:
        data, constant: the tensors that it adds.
        axis: the axis of the channels; None for a single value.
    """

    data: str
    constant: str
    axis: int | None


Part: TypeAlias = Norm | Linear | Shift


class Operation(NamedTuple):
    """A node of the graph.

    Attributes:
        name: what the file calls it.
        operator: what it does, in the format's own word.
        reads, writes: tensors by name, in the operator's order.
        part: what it is for a norm beside it; None for anything else.
    """

    name: str
    operator: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    part: Part | None = None

    def __str__(self) -> str:
        return f"{self.operator} {self.name}"


class Graph:
    """All operations of a model, those of nested graphs too.

    Args:
        operations: in the order of the file.
        constants: tensors that are the same in every run.
        results: tensors that the model, or a nested graph, returns.
    """

    def __init__(self, operations: Sequence[Operation], constants: Collection[str], results: Collection[str]) -> None:
        self.operations = list(operations)
        self.constants = frozenset(constants)
        self.results = frozenset(results)
        self._writers = {tensor: operation for operation in operations for tensor in operation.writes}
        self._readers: dict[str, list[Operation]] = defaultdict(list)
        for operation in operations:
            for tensor in operation.reads:
                self._readers[tensor].append(operation)

    def writer(self, tensor: str) -> Operation | None:
        """The operation that writes it; None for inputs of the model and for constants of the file."""
        return self._writers.get(tensor)

    def readers(self, tensor: str) -> list[Operation]:
        """The operations that read it, one that reads it twice twice."""
        return list(self._readers.get(tensor, ()))
