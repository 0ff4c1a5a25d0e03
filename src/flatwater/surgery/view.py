"""ModelView: how framework-free surgery sees a model. ``flatwater.paddle.surgery.view`` implements it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from flatwater.surgery.arithmetic import LinearValues, NormValues
from flatwater.surgery.report import Movement

__all__ = ["ELSEWHERE", "Absorption", "Call", "Fold", "ModelView", "Movements", "Ports", "Source", "Trace"]

_Array: TypeAlias = npt.NDArray[np.float64]
_Indices: TypeAlias = npt.NDArray[np.intp]

ELSEWHERE = -1
"""In place of a call: what is read there was not copied from what a linear or norm layer wrote."""


class Source(NamedTuple):
    """Where each channel that a call reads was copied from, whatever reshaped, sliced, joined or reordered it.

    Attributes:
        calls: for each channel the index of the call that wrote it, or ``ELSEWHERE``.
        channels: for each channel which of that call's it is.
    """

    calls: _Indices
    channels: _Indices

    @classmethod
    def whole(cls, call: int, channels: int) -> Source:
        """The very tensor that ``call`` wrote."""
        return cls(np.full(channels, call, np.intp), np.arange(channels, dtype=np.intp))

    def writers(self) -> list[int]:
        """Each call of which something is read, once."""
        return [int(call) for call in np.unique(self.calls) if call != ELSEWHERE]


class Call(NamedTuple):
    """One run of one layer.

    Attributes:
        path: the layer's.
        reads: where its input comes from; None if that is not known channel by channel.
        note: why ``reads`` is None, if there is more to say than that nothing is known.
    """

    path: str
    reads: Source | None
    note: str = ""


class Ports(NamedTuple):
    """What of a linear layer's shape decides what it can take up.

    Attributes:
        inputs, outputs: how many channels.
        even: every output sees all taps of the weight, so that a constant input gives one constant in each output
            channel. Zeros padded around the input, and the overlaps of a transposed convolution, make it uneven.
    """

    inputs: int
    outputs: int
    even: bool = False


@dataclass
class Trace:
    """The dataflow of one run on the example inputs.

    Attributes:
        linears, norms: path -> why this layer can never be folded, None if nothing speaks against it.
        calls: in the order in which they ran.
        ports: the linear layers' channels.
        shared: path of a linear or norm layer -> the others with which it has a parameter in common, for a norm
            layers of any kind.
        fused: path of a norm -> what it applies itself behind its arithmetic, as words: an activation, a residual.
    """

    linears: dict[str, str | None]
    norms: dict[str, str | None]
    calls: list[Call]
    ports: dict[str, Ports] = field(default_factory=dict)
    shared: dict[str, set[str]] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)


class Absorption(NamedTuple):
    """A layer that takes up norm layers, and which channel takes up what.

    Attributes:
        path: of a linear layer, or of a norm that takes up a norm before it.
        norms: for each of its channels the path of the norm, None where it takes up none.
        channels: for each which of that norm's channels.
    """

    path: str
    norms: Sequence[str | None]
    channels: _Indices


class Fold(NamedTuple):
    """Norm layers that go at once, and the layers that take them up.

    Attributes:
        norms: the norm layers that go.
        absorptions: what the layers beside them take up.
        after: the norms come after the layers that absorb them; False: they come before.
    """

    norms: tuple[str, ...]
    absorptions: tuple[Absorption, ...]
    after: bool

    @property
    def hidden(self) -> tuple[str, ...]:
        """The layers whose output nobody but ``readers`` may read."""
        return tuple(one.path for one in self.absorptions) if self.after else self.norms

    @property
    def readers(self) -> tuple[str, ...]:
        """The layers between which and ``hidden`` the fold takes place."""
        return self.norms if self.after else tuple(one.path for one in self.absorptions)


class Movements(NamedTuple):
    """How far each tensor that was observed has moved: outputs by name, what norm layers write by path."""

    outputs: Mapping[str, Movement]
    norms: Mapping[str, Movement]


class ModelView(Protocol):
    """A model together with the example inputs on which changes to it are proven."""

    def is_norm(self, path: str) -> bool:
        """Whether this is a norm layer, and not a linear one."""
        ...

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

    def largest(self, path: str) -> float:
        """The largest number that the parameters of this layer hold."""
        ...

    def observe(self, *, shaken: bool = False) -> Any:
        """Run the example inputs in eval mode: the outputs, and samples of what each norm layer writes.

        Args:
            shaken: with every float of the inputs moved by one unit in the last place.
        """
        ...

    def unprovable(self, observation: Any) -> str | None:
        """Why nothing can be proven with this observation, None if something can."""
        ...

    def observe_poisoned(self, folds: Sequence[Fold]) -> Sequence[Any]:
        """The same, while all but the ``readers`` of each fold read rubbish where its ``hidden`` layers wrote.

        Once per kind of rubbish. An empty sequence if the model cannot run like this.
        """
        ...

    def read_elsewhere(self, folds: Sequence[Fold]) -> list[Fold]:
        """The folds whose hidden outputs have a gradient though their readers pass none on: others read them too.

        A quick look, which sees no reader that is not differentiable. Empty if the model has no gradients.
        """
        ...

    def movements(self, before: Any, after: Any) -> Movements:
        """How far apart two observations are, tensor by tensor."""
        ...

    def absorb(self, path: str, weight: _Array, bias: _Array | None, *, like: str) -> Callable[[], None]:
        """Give a layer these values (bias None: it keeps having none); returns the exact way back.

        Args:
            like: path of the norm whose bias a bias that has to be made is to train like.
        """
        ...

    def retire(self, norm: str) -> Callable[[], None]:
        """Take a norm out, all but the activation and residual that it fuses; returns the exact way back."""
        ...
