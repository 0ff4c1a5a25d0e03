"""One call of a norm: its settings, its statistics, and the kernels that compute it in either direction."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import paddle

from flatwater import kernels
from flatwater.errors import InputError
from flatwater.kernels import Statistics
from flatwater.paddle.dtypes import dtype_name
from flatwater.spec import Activation

__all__ = ["NormCall", "plain_shape"]


def plain_shape(shape: Sequence[int], *, channels_last: bool) -> tuple[int, int, int]:
    """``(outer, channels, inner)``: samples, channels, and all spatial dimensions as one."""
    outer, *rest = shape
    channels = rest.pop() if channels_last else rest.pop(0)
    return outer, channels, prod(rest)


class NormCall:
    """One call of batch or group norm, from its forward pass to its backward pass.

    Args:
        channels_last: where the channels of x stand.
        activation: fused after γ·x̂ + β + residual.
        epsilon: added to the variance.
        groups: of channels, for statistics of each sample and group (instance norm has as many groups as
            channels); None for those of each channel over the batch.
        constants: moving mean and variance, to be taken instead of the batch's; no gradient flows through them.
    """

    # Both from the forward pass.
    _step: kernels.Step
    _like: tuple[list[int], Any]

    def __init__(
        self,
        *,
        channels_last: bool,
        activation: Activation,
        epsilon: float,
        groups: int | None = None,
        constants: tuple[paddle.Tensor, paddle.Tensor] | None = None,
    ) -> None:
        self.channels_last = channels_last
        self.activation = activation
        self.epsilon = epsilon
        self.groups = groups
        self.frozen = constants is not None
        self._constants = constants

    @property
    def mean(self) -> Statistics:
        """Of each channel, or of each sample and group, once the forward pass has run."""
        return self._step.mean

    @property
    def inv_std(self) -> Statistics:
        """(variance + epsilon)^(-1/2), as :attr:`mean`."""
        return self._step.inv_std

    def forward(
        self,
        x: paddle.Tensor,
        y: paddle.Tensor,
        weight: paddle.Tensor | None,
        bias: paddle.Tensor | None,
        residual: paddle.Tensor | None,
    ) -> None:
        """Fill ``y``, and the statistics unless they are constants. Tensors shaped like x are dense."""
        self._like = (x.shape, x.dtype)
        step = self._step = kernels.begin(
            plain_shape(x.shape, channels_last=self.channels_last),
            dtype_name(x),
            channels_last=self.channels_last,
            activation=self.activation,
            epsilon=self.epsilon,
            groups=self.groups,
        )
        if self._constants is not None:
            mean, variance = self._constants
            step.freeze(self._per_channel(mean), self._per_channel(variance))
        step.forward(x.data_ptr(), y.data_ptr(), _address(residual), self._per_channel(weight), self._per_channel(bias))

    def update(self, mean: paddle.Tensor, variance: paddle.Tensor, *, momentum: float, unbiased: bool) -> None:
        """``moving = momentum · moving + (1 - momentum) · batch``, in the memory of these buffers."""
        self._step.update(self._per_channel(mean), self._per_channel(variance), momentum, unbiased)

    def backward(
        self,
        dy: paddle.Tensor,
        x: paddle.Tensor,
        residual: paddle.Tensor | None,
        y: paddle.Tensor | None,
        dx: paddle.Tensor | None,
        dresidual: paddle.Tensor | None,
        dweight: paddle.Tensor | None,
        dbias: paddle.Tensor | None,
    ) -> None:
        """Fill those of the gradients that are wanted. Where :data:`SLOPE_IN_OUTPUT` says so, y will do for a residual.

        Raises:
            InputError: ``dy``, or what a hook made of a saved tensor, is not like the input of the forward pass.
        """
        self.check_like(dy, x, residual, y)
        self._step.backward(dy.data_ptr(), x.data_ptr(), *map(_address, (residual, y, dx, dresidual, dweight, dbias)))

    def check_like(self, *tensors: paddle.Tensor | None) -> None:
        """Raise InputError unless all tensors have the shape and dtype that the forward pass had."""
        for tensor in tensors:
            if tensor is not None and (tensor.shape, tensor.dtype) != self._like:
                shape, dtype = self._like
                raise InputError(
                    f"a {tensor.dtype} tensor of shape {list(tensor.shape)} came to a norm layer whose input is "
                    f"{dtype} of shape {list(shape)}; let the hook that made it keep both"
                )

    def _per_channel(self, tensor: paddle.Tensor | None) -> int:
        if tensor is None:
            return 0
        wanted = paddle.float64 if self._like[1] is paddle.float64 else paddle.float32
        if tensor.dtype is not wanted:  # there is one of each
            raise InputError(
                f"{tensor.name!r} has {tensor.dtype} values, but the kernels take {wanted} ones "
                f"for {self._like[1]} input; cast the layer with layer.to(dtype=...)"
            )
        return int(tensor.data_ptr())


def _address(tensor: paddle.Tensor | None) -> int:
    return 0 if tensor is None else int(tensor.data_ptr())
