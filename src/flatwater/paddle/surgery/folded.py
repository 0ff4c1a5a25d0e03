"""What stays of a norm layer whose arithmetic has gone into the convolution before it."""

from __future__ import annotations

from collections.abc import Callable

import paddle
import paddle.nn.functional as F

from flatwater.paddle.composite import activate
from flatwater.paddle.norm import check_residual_shape
from flatwater.spec import canonical_activation

__all__ = ["FoldedNorm"]

# What paddle.nn.BatchNorm(act=...) takes besides the activations that Flatwater fuses.
_OTHER_ACTIVATIONS: dict[str, Callable[[paddle.Tensor], paddle.Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "hard_sigmoid": F.hardsigmoid,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "sigmoid": F.sigmoid,
    "softplus": F.softplus,
    "tanh": F.tanh,
}


class FoldedNorm(paddle.nn.Layer):
    """``act(x + residual)``, with Paddle's operators; the same in ``train()`` and ``eval()``.

    It stands where :func:`~flatwater.paddle.fold` found a batch norm, so that a model's code, which goes on
    calling ``self.bn(x)`` or ``self.bn(x, residual)``, need not change. It has no parameters.

    Args:
        act: any activation that the norm layers fuse, or that ``paddle.nn.BatchNorm`` takes by name.

    Raises:
        InputError: an activation that is neither.
    """

    def __init__(self, act: str | None = None) -> None:
        super().__init__()
        self._act = act
        if act not in _OTHER_ACTIVATIONS:
            canonical_activation(act)

    def forward(self, x: paddle.Tensor, residual: paddle.Tensor | None = None) -> paddle.Tensor:
        """``act(x + residual)``; ``residual`` has the shape and dtype of ``x``, or is None.

        Raises:
            InputError: the shapes differ.
        """
        check_residual_shape(lambda: "FoldedNorm", x, residual)
        z = x if residual is None else x + residual
        other = _OTHER_ACTIVATIONS.get(self._act or "")
        return activate(z, canonical_activation(self._act)) if other is None else other(z)

    def extra_repr(self) -> str:
        """The activation, if there is one."""
        return f"act={self._act}" if self._act else ""
