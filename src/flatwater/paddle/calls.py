"""One call of a norm: its settings, its statistics, and which kernels compute it in either direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import paddle

from flatwater import kernels
from flatwater.kernels import Buffer, Statistics
from flatwater.spec import Activation

__all__ = ["BatchNormCall", "GroupNormCall", "NormCall"]


@dataclass
class BatchNormCall:
    """One call of batch norm: its settings, and the statistics that it leaves behind.

    Attributes:
        channels_last: where the channels of x stand.
        activation: fused after γ·x̂ + β + residual.
        epsilon: added to the variance.
        mean, inv_std: float64, one per channel. Given where ``frozen``, else filled.
        m2: Σ(x - mean)², filled unless ``frozen``.
        frozen: statistics are constants, so no gradient flows through them.
        count: values per channel behind the statistics, set by the forward pass.
    """

    channels_last: bool
    activation: Activation
    epsilon: float
    mean: Statistics
    inv_std: Statistics
    m2: Statistics
    frozen: bool = False
    count: int = 0

    @classmethod
    def over_batch(cls, channels: int, *, channels_last: bool, activation: Activation, epsilon: float) -> BatchNormCall:
        """A call that takes its statistics from the batch."""
        return cls(channels_last, activation, epsilon, np.zeros(channels), np.zeros(channels), np.zeros(channels))

    @classmethod
    def with_constants(
        cls,
        mean: paddle.Tensor,
        variance: paddle.Tensor,
        *,
        channels_last: bool,
        activation: Activation,
        epsilon: float,
    ) -> BatchNormCall:
        """A call that takes its statistics from the moving ones, as constants."""
        inv_std = 1.0 / np.sqrt(variance.numpy().astype(np.float64) + epsilon)
        mean64 = mean.numpy().astype(np.float64)
        return cls(channels_last, activation, epsilon, mean64, inv_std, np.empty(0), frozen=True)

    def forward(self, x: Buffer, y: Buffer, **settings: Any) -> None:
        """Fill ``y``, and the statistics unless they are constants."""
        if self.frozen:
            kernels.batch_normalize(x, y, mean=self.mean, inv_std=self.inv_std, activation=self.activation, **settings)
            return
        self.count = kernels.batch_norm_forward(
            x,
            y,
            mean=self.mean,
            m2=self.m2,
            inv_std=self.inv_std,
            epsilon=self.epsilon,
            activation=self.activation,
            **settings,
        )

    def backward(self, dy: Buffer, x: Buffer, dx: Buffer | None, dresidual: Buffer | None, **settings: Any) -> None:
        """Fill ``dx`` and ``dresidual``, where they are wanted, and the sums."""
        kernels.batch_norm_backward(
            dy,
            x,
            dx,
            dresidual,
            mean=self.mean,
            inv_std=self.inv_std,
            frozen=self.frozen,
            activation=self.activation,
            **settings,
        )


@dataclass
class GroupNormCall:
    """One call of group norm; instance norm is the one with as many groups as channels.

    Attributes:
        groups, channels_last, activation, epsilon: the layer's settings.
        mean, m2, inv_std: float64, one per sample and group, filled by the forward pass.
    """

    groups: int
    channels_last: bool
    activation: Activation
    epsilon: float
    mean: Statistics
    m2: Statistics
    inv_std: Statistics

    @classmethod
    def over_samples(
        cls, samples: int, *, groups: int, channels_last: bool, activation: Activation, epsilon: float
    ) -> GroupNormCall:
        """A call with room for the statistics of ``samples`` samples."""
        size = samples * groups
        return cls(groups, channels_last, activation, epsilon, np.zeros(size), np.zeros(size), np.zeros(size))

    def forward(self, x: Buffer, y: Buffer, **settings: Any) -> None:
        """Fill ``y`` and the statistics."""
        kernels.group_norm_forward(
            x,
            y,
            groups=self.groups,
            mean=self.mean,
            m2=self.m2,
            inv_std=self.inv_std,
            epsilon=self.epsilon,
            activation=self.activation,
            **settings,
        )

    def backward(self, dy: Buffer, x: Buffer, dx: Buffer | None, dresidual: Buffer | None, **settings: Any) -> None:
        """Fill ``dx`` and ``dresidual``, where they are wanted, and the sums."""
        kernels.group_norm_backward(
            dy,
            x,
            dx,
            dresidual,
            groups=self.groups,
            mean=self.mean,
            inv_std=self.inv_std,
            activation=self.activation,
            **settings,
        )


NormCall: TypeAlias = BatchNormCall | GroupNormCall
