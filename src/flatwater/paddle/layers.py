"""Normalization layers for Paddle: Paddle's classes outside, Flatwater's kernels inside.

Each layer subclasses Paddle's layer of the same name. Arguments, defaults, ``state_dict`` keys and
``isinstance`` are Paddle's, so checkpoints and other tools go on working. What is new stands in
keyword arguments:

``act``
    an activation fused behind the norm: ``None``, ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (slope 0.01),
    ``"hardswish"``, ``"swish"`` or ``"silu"``.
``single_value``
    what training does with one value per channel, of which no variance exists: ``"error"``, or
    ``"passthrough"``, Paddle's way: x comes back, γ and β are not applied, statistics stay.
``layer(x, residual)``
    adds a tensor shaped like x before the activation.

The backward pass reads x, and with a residual under ``relu``, ``relu6`` or ``leaky_relu`` the output too, under
``hardswish`` or ``swish`` the residual: whoever changes one of these in place before it gets an error there, as from
Paddle's own layers.

Modes: in ``train()`` on the CPU the kernels compute, in dynamic mode; in ``eval()``, in captured
graphs and on other devices Paddle's own operators do, with the same results; but Paddle's ReLU makes 0 of NaN, which
the kernels' lets through.
:func:`~flatwater.paddle.backend_of` says which.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F

from flatwater.errors import InputError, SingleValueError
from flatwater.paddle.autograd import normalize
from flatwater.paddle.backend import Backend, is_replay
from flatwater.paddle.calls import NormCall
from flatwater.paddle.composite import exportable_group_norm
from flatwater.paddle.kinds import normalizes_by_batch
from flatwater.paddle.norm import Held, Input, NormLayer
from flatwater.spec import SingleValue

__all__ = [
    "BatchNorm",
    "BatchNorm1D",
    "BatchNorm2D",
    "BatchNorm3D",
    "GroupNorm",
    "InstanceNorm1D",
    "InstanceNorm2D",
    "InstanceNorm3D",
    "backend_of",
]


class _BatchNorm(NormLayer):
    """Batch normalization (Ioffe & Szegedy, 2015).

        y = act(γ·(x - mean)·(var + ε)^(-1/2) + β + residual)

    ========================  =============================  =========================================
    mode                      mean and var                   moving statistics
    ========================  =============================  =========================================
    ``train()``               of the batch, over all axes    ``moving = momentum·moving
                              but the channel's              + (1 - momentum)·batch``, var biased
    ``train()``, frozen       the moving ones, as constants  stay
    (``use_global_stats``)
    ``eval()``                the moving ones, as constants  stay
    ========================  =============================  =========================================

    ``use_global_stats``: True freezes the statistics; None and False do not. (Paddle's
    ``BatchNorm2D`` with False normalizes by the batch in ``eval()`` too, and goes on updating. Here
    ``eval()`` always means the moving statistics.)
    """

    def _channels(self) -> int:
        return int(self._mean.shape[0])

    def forward(self, x: paddle.Tensor, residual: paddle.Tensor | None = None) -> paddle.Tensor:
        """``act(γ·x̂ + β + residual)``; in training the moving statistics follow the batch.

        Args:
            x: float tensor, channels where the layer's data format says, of any strides.
            residual: of x's shape and dtype, added before the activation.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            InputError: wrong rank, channel count or dtype, or a residual that does not fit.
            SingleValueError: training with one value per channel, under ``single_value="error"``.
        """
        held = self._held()
        found = self._check(x, residual, held)
        by_batch = normalizes_by_batch(self, training=self.training)
        if by_batch and found.single_value:
            self._refuse_single_value(x)
            return self._finish(x, residual)
        if self._backend(x, held) == "paddle":
            return self._finish(self._paddle_batch_norm(x, by_batch=by_batch), residual)
        return self._kernel_batch_norm(x, residual, held, found, by_batch=by_batch)

    def _held(self) -> Held:
        return Held(self._tensor("weight"), self._tensor("bias"), self._tensor("_mean"), self._tensor("_variance"))

    def _refuse_single_value(self, x: paddle.Tensor) -> None:
        if self._single_value == "error":
            raise SingleValueError(
                f"{self._label()} got one value per channel (input shape {list(x.shape)}) in training, of which no "
                "variance exists; use a larger batch, eval() or freezing, GroupNorm, "
                "or single_value='passthrough' to hand x through as Paddle does"
            )

    def _kernel_batch_norm(
        self, x: paddle.Tensor, residual: paddle.Tensor | None, held: Held, found: Input, *, by_batch: bool
    ) -> paddle.Tensor:
        spec = self._spec()
        weight, bias, mean, variance = held
        call = NormCall(
            channels_last=found.channels_last,
            activation=spec.activation,
            epsilon=spec.epsilon,
            constants=None if by_batch else (mean, variance),
        )
        y = normalize(x, weight, bias, residual, call)
        if by_batch and not is_replay():
            call.update(mean, variance, momentum=spec.momentum, unbiased=spec.unbiased)
        return y

    def _paddle_batch_norm(self, x: paddle.Tensor, *, by_batch: bool) -> paddle.Tensor:
        return F.batch_norm(
            x,
            self._mean,
            self._variance,
            weight=self.weight,
            bias=self.bias,
            training=self.training,
            # A replay must not move the statistics a second time: with momentum 1 all of the old is kept.
            momentum=1.0 if by_batch and is_replay() else self._momentum,
            epsilon=self._epsilon,
            data_format="NHWC" if self._channels_last() else "NCHW",
            use_global_stats=None if by_batch == self.training else not by_batch,
        )


class BatchNorm(_BatchNorm, paddle.nn.BatchNorm):
    __doc__ = f"""Batch norm for any input of rank 2 to 5; subclass of ``paddle.nn.BatchNorm``.

    ``trainable_statistics=True`` is Paddle's: the batch's statistics in ``eval()`` too.
    {_BatchNorm.__doc__}"""

    _ranks = (2, 3, 4, 5)

    def __init__(
        self, num_channels: int, act: str | None = None, *args: Any, single_value: SingleValue = "error", **kwargs: Any
    ) -> None:
        super().__init__(num_channels, act, *args, **kwargs)
        self._extend(act, single_value)


class _BatchNormOfRank(_BatchNorm):
    def __init__(self, *args: Any, act: str | None = None, single_value: SingleValue = "error", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._extend(act, single_value)


class BatchNorm1D(_BatchNormOfRank, paddle.nn.BatchNorm1D):
    __doc__ = f"""Batch norm for (N, C), (N, C, L) or (N, L, C); subclass of ``paddle.nn.BatchNorm1D``.
    {_BatchNorm.__doc__}"""

    _ranks = (2, 3)


class BatchNorm2D(_BatchNormOfRank, paddle.nn.BatchNorm2D):
    __doc__ = f"""Batch norm for (N, C, H, W) or (N, H, W, C); subclass of ``paddle.nn.BatchNorm2D``.
    {_BatchNorm.__doc__}"""

    _ranks = (4,)


class BatchNorm3D(_BatchNormOfRank, paddle.nn.BatchNorm3D):
    __doc__ = f"""Batch norm for (N, C, D, H, W) or (N, D, H, W, C); subclass of ``paddle.nn.BatchNorm3D``.
    {_BatchNorm.__doc__}"""

    _ranks = (5,)


class _SampleNorm(NormLayer):
    """Statistics per sample and group of channels; the same in ``train()`` and ``eval()``."""

    def _groups(self) -> int:
        raise NotImplementedError

    def _paddle_norm(self, x: paddle.Tensor) -> paddle.Tensor:
        raise NotImplementedError

    def forward(self, x: paddle.Tensor, residual: paddle.Tensor | None = None) -> paddle.Tensor:
        """``act(γ·x̂ + β + residual)`` with each sample's own statistics.

        Args:
            x: float tensor, channels where the layer's data format says, of any strides.
            residual: of x's shape and dtype, added before the activation.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            InputError: wrong rank, channel count or dtype, or a residual that does not fit.
        """
        held = self._held()
        found = self._check(x, residual, held)
        if self._backend(x, held) == "paddle":
            return self._finish(self._paddle_norm(x), residual)
        spec = self._spec()
        call = NormCall(
            channels_last=found.channels_last,
            activation=spec.activation,
            epsilon=spec.epsilon,
            groups=self._groups(),
        )
        return normalize(x, held.weight, held.bias, residual, call)

    def _held(self) -> Held:
        return Held(self._tensor("weight"), self._tensor("bias"))


class GroupNorm(_SampleNorm, paddle.nn.GroupNorm):
    """Group normalization (Wu & He, 2018); subclass of ``paddle.nn.GroupNorm``.

        y = act(γ·(x - mean)·(var + ε)^(-1/2) + β + residual)

    with mean and var over each group of channels of each sample, so that a batch of one is as good as
    any. Takes rank 2 or more, channels first or last. The same in ``train()`` and ``eval()``.
    """

    _ranks = (2, 3, 4, 5, 6)

    def __init__(self, *args: Any, act: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._num_groups < 1 or self._num_channels % self._num_groups:
            raise InputError(
                f"GroupNorm: num_groups={self._num_groups} does not divide num_channels={self._num_channels}; "
                "choose a divisor"
            )
        self._extend(act)

    def _channels(self) -> int:
        return int(self._num_channels)

    def _groups(self) -> int:
        return int(self._num_groups)

    def _paddle_norm(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.training or paddle.in_dynamic_mode():
            return F.group_norm(x, self._num_groups, self._epsilon, self.weight, self.bias, self._data_format)
        return exportable_group_norm(
            x,
            self.weight,
            self.bias,
            groups=self._num_groups,
            channels=self._num_channels,
            epsilon=self._epsilon,
            channels_last=self._channels_last(),
        )


class _InstanceNorm(_SampleNorm):
    """Instance normalization (Ulyanov, Vedaldi & Lempitsky, 2016).

        y = act(γ·(x - mean)·(var + ε)^(-1/2) + β + residual)

    with mean and var over the spatial dimensions of each channel of each sample. The same in
    ``train()`` and ``eval()``; ``momentum`` is taken for compatibility and not used, as in Paddle.
    """

    def __init__(self, *args: Any, act: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._extend(act)

    def _held(self) -> Held:
        return Held(self._tensor("scale"), self._tensor("bias"))

    def _channels(self) -> int:
        return int(self._num_features)

    def _groups(self) -> int:
        return int(self._num_features)

    def _paddle_norm(self, x: paddle.Tensor) -> paddle.Tensor:
        if self._channels_last():  # Paddle's operator takes channels first only, whatever its data_format says
            last = x.ndim - 1
            return self._channels_first_norm(x.moveaxis(last, 1)).moveaxis(1, last)
        return self._channels_first_norm(x)

    def _channels_first_norm(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.instance_norm(x, weight=self.scale, bias=self.bias, momentum=self._momentum, eps=self._epsilon)


class InstanceNorm1D(_InstanceNorm, paddle.nn.InstanceNorm1D):
    __doc__ = f"""Instance norm for (N, C, L); subclass of ``paddle.nn.InstanceNorm1D``.
    {_InstanceNorm.__doc__}"""

    _ranks = (2, 3)


class InstanceNorm2D(_InstanceNorm, paddle.nn.InstanceNorm2D):
    __doc__ = f"""Instance norm for (N, C, H, W); subclass of ``paddle.nn.InstanceNorm2D``.
    {_InstanceNorm.__doc__}"""

    _ranks = (4,)


class InstanceNorm3D(_InstanceNorm, paddle.nn.InstanceNorm3D):
    __doc__ = f"""Instance norm for (N, C, D, H, W); subclass of ``paddle.nn.InstanceNorm3D``.
    {_InstanceNorm.__doc__}"""

    _ranks = (5,)


def backend_of(layer: paddle.nn.Layer, x: paddle.Tensor) -> Backend:
    """Which computes ``layer(x)`` now: ``"flatwater"``, the kernels, or ``"paddle"``, Paddle's operators.

    Raises:
        InputError: ``layer`` is not a norm layer of Flatwater's.
    """
    if not isinstance(layer, NormLayer):
        raise InputError(
            f"backend_of got a {type(layer).__name__}, which is not a norm layer of flatwater.paddle; "
            "give it one, or convert the model with fw.convert(model)"
        )
    return layer._backend(x, layer._held())
