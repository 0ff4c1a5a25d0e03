"""ModelView: how framework-free surgery sees a model. ``flatwater.paddle.view`` implements it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from flatwater.surgery.arithmetic import LinearValues, NormValues, _Array
from flatwater.surgery.report import FoldedPair, Movement

__all__ = ["Call", "ModelView", "Trace"]


class Call(NamedTuple):
    """One run of one layer.

    Attributes:
        path: the layer's.
        reads, writes: tokens of the tensors; two tokens are equal if and only if the tensors are the same object.
        channel_axis: the axis of ``reads`` (norm) or ``writes`` (linear) that the layer treats as channels.
    """

    path: str
    reads: int | None
    writes: int | None
    channel_axis: int


@dataclass
class Trace:
    """The dataflow of one run on the example inputs.

    Attributes:
        linears, norms: path -> why this layer can never be folded, None if nothing speaks against it.
        calls: in the order in which they ran.
    """

    linears: dict[str, str | None]
    norms: dict[str, str | None]
    calls: list[Call]


class ModelView(Protocol):
    """A model together with the example inputs on which changes to it are proven."""

    def trace(self) -> Trace:
        """Run the example inputs in eval mode and note what every linear and norm layer reads and writes.

        Raises:
            SurgeryError: the model does not run on them.
        """
        ...

    def linear_values(self, path: str) -> LinearValues:
        """Weight and bias of a linear layer, as float64 copies."""
        ...

    def norm_values(self, path: str) -> NormValues:
        """γ, β, running statistics and ε of a norm layer, as float64 copies."""
        ...

    def observe(self) -> Any:
        """Run the example inputs in eval mode: the outputs, and samples of what each norm layer writes."""
        ...

    def unprovable(self, observation: Any) -> str | None:
        """Why nothing can be proven with this observation, None if something can."""
        ...

    def observe_poisoned(self, pairs: Sequence[FoldedPair]) -> Sequence[Any]:
        """The same, while all but the norms of ``pairs`` read rubbish where their convs' outputs were.

        Once per kind of rubbish. An empty sequence if the model cannot run like this.
        """
        ...

    def movement(self, before: Any, after: Any, *, outputs_only: bool = False) -> Movement:
        """How far two observations are apart: the largest of all that was observed, or of the outputs."""
        ...

    def substitute(self, pair: FoldedPair, weight: _Array, bias: _Array) -> Callable[[], None]:
        """Give the conv these values and take the norm out; returns the exact way back."""
        ...
