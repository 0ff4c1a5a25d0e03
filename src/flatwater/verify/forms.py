"""What a form of a model is: something that runs, and that may let itself be looked into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy.typing as npt

from flatwater.inspection import Graph

__all__ = ["Arrays", "Decode", "Form", "Inside", "Look", "Run", "Written", "one_line"]

Arrays: TypeAlias = list[npt.NDArray[Any]]
Run: TypeAlias = Callable[[Arrays], Arrays]
Decode: TypeAlias = Callable[[Arrays], Sequence[Any]]


class Inside(NamedTuple):
    """What the file of a form computes on the way to its outputs.

    Attributes:
        graph: of the file.
        tensors: the floating-point tensors that it can be made to return, in the order of the file.
        plain: loads it so that it returns the tensors of these names, computed as the file says.
        load: the same, computed as the form does, which may optimise.
    """

    graph: Graph
    tensors: list[str]
    plain: Callable[[Sequence[str]], Run]
    load: Callable[[Sequence[str]], Run]


class Form(NamedTuple):
    """A form of a model.

    Attributes:
        name: what the table calls it.
        load: makes it ready to run.
        inside: opens its file; None for a form that cannot be looked into.
    """

    name: str
    load: Callable[[], Run]
    inside: Callable[[], Inside] | None = None


class Written(NamedTuple):
    """What a layer of the reference wrote in one run.

    Attributes:
        layer: what it is called.
        tensor: what it wrote.
        read_by: what the operations wrote that read just this tensor.
        norm: whether it normalizes.
    """

    layer: str
    tensor: npt.NDArray[Any]
    read_by: list[npt.NDArray[Any]]
    norm: bool = True


Look: TypeAlias = Callable[[Arrays], list[Written]]


def one_line(error: BaseException) -> str:
    """The line of a message that says what happened; frameworks wrap it in banners and stack traces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error:" in line] or [line for line in lines if not line.startswith("---")]
    return (telling[-1] if telling else type(error).__name__)[:300]
