"""NormSpec: everything about a normalization layer on which frameworks disagree, said once.

==========================  =====================================  ==============================
question                    PaddlePaddle 3.x                       PyTorch
==========================  =====================================  ==============================
what is ``momentum``?       share of the OLD statistic kept, 0.9   share of the NEW one, 0.1
running variance            biased on CPU (divides by N)           unbiased (divides by N - 1)
one value per channel,      x passes through, nothing is updated   ValueError
in training
==========================  =====================================  ==============================

A front end translates its framework's conventions into these fields; nothing below it ever asks
which framework is above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from flatwater.errors import InputError

__all__ = ["ACTIVATIONS", "SLOPE_IN_OUTPUT", "Activation", "NormSpec", "SingleValue", "canonical_activation"]

Activation = Literal["none", "relu", "relu6", "leaky_relu", "hardswish", "swish"]
SingleValue = Literal["error", "passthrough"]

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

SLOPE_IN_OUTPUT: tuple[Activation, ...] = ("none", "relu", "relu6", "leaky_relu")
"""Those whose derivative follows from y = act(z), so that z need not be known."""

_ALIASES = {"silu": "swish", "hard_swish": "hardswish", "identity": "none"}


def canonical_activation(name: str | None) -> Activation:
    """The one name under which an activation is known here.

    ``None``, ``"none"`` and ``"identity"`` are the same, as are ``"silu"`` and ``"swish"``
    (x · sigmoid(x)), ``"hard_swish"`` and ``"hardswish"`` (x · min(max(x + 3, 0), 6) / 6).
    ``"leaky_relu"`` has the slope 0.01, the default of both frameworks.

    Raises:
        InputError: the name is not one that the kernels fuse.
    """
    key = "none" if name is None else str(name).lower()
    key = _ALIASES.get(key, key)
    for known in ACTIVATIONS:
        if key == known:
            return known
    raise InputError(f"act={name!r} is not a fused activation; use one of {', '.join(ACTIVATIONS)} (or None)")


@dataclass(frozen=True, slots=True)
class NormSpec:
    """The semantics of one normalization layer, free of any framework.

    Attributes:
        epsilon: added to the variance before the square root.
        momentum: share of the OLD running statistic kept at each training step:
            ``moving = momentum * moving + (1 - momentum) * batch``.
        unbiased: whether the running variance divides by N - 1; the variance used to normalise
            the batch always divides by N.
        single_value: what training does with one value per channel: ``"error"``, or
            ``"passthrough"`` (y = x, no γ and β, no statistics), which is what Paddle does.
        activation: applied to γ·x̂ + β (+ residual), fused in training.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    unbiased: bool = False
    single_value: SingleValue = "error"
    activation: Activation = "none"

    def __post_init__(self) -> None:
        if not self.epsilon >= 0.0:
            raise InputError(f"epsilon={self.epsilon!r} must be a number of at least 0")
        if not 0.0 <= self.momentum <= 1.0:
            raise InputError(
                f"momentum={self.momentum!r} must lie in [0, 1]: it is the share of the old running statistic "
                "that is kept (Paddle's sense; PyTorch's momentum is 1 minus this)"
            )
        if self.single_value not in get_args(SingleValue):
            raise InputError(f"single_value={self.single_value!r} must be 'error' or 'passthrough'")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}")
