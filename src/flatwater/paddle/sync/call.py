"""Synchronised batch norm as a differentiable function: the kernels' halves, and between them one sum over ranks.

The forward pass sums, for each channel, over ranks r with n_r values of mean m_r and M2_r = Σ(x - m_r)²,

    N = Σ n_r        S = Σ n_r·(m_r - c)        Q = Σ (M2_r + n_r·(m_r - c)²)
    mean = c + S/N                              M2 = Q - S²/N

about a pivot c, the running mean, which every rank holds. All is float64. M2 loses by the subtraction at most
about ((mean - c)/deviation)²·2⁻⁵³ of itself: 1e-8 where the mean is 10⁴ deviations from the pivot, as in the
first step of a layer whose running mean is still 0, and nothing to speak of once it has followed.

The backward pass sums Σdz and Σdz·x̂. A rank without values brings zeros to both, and waits like the others.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import paddle
from paddle.autograd import PyLayer

from flatwater import kernels
from flatwater.errors import InputError, SingleValueError
from flatwater.kernels import Buffer, Statistics, Vector
from flatwater.paddle.dtypes import dtype_name
from flatwater.paddle.memory import empty_like
from flatwater.paddle.saved import recall, save, wanted
from flatwater.paddle.sync.collectives import Communicator, Direction, Operation
from flatwater.spec import Activation, NormSpec

__all__ = ["Shared", "SyncNormCall", "combine", "contribution", "normalize_shared", "refuse_second_derivative"]


@dataclass(frozen=True)
class Shared:
    """With whom statistics are shared.

    Attributes:
        communicator: the ranks.
        layer: how the layer is called in messages.
        timeout: seconds to wait for the other ranks.
        settings: of the layer, in messages: with others, ranks would compute something else.
    """

    communicator: Communicator
    layer: str
    timeout: float
    settings: str


def contribution(count: int, mean: Statistics, m2: Statistics, pivot: Statistics) -> Statistics:
    """What a rank brings to the forward's sum: n, n·(m - c) for each channel, M2 + n·(m - c)² for each."""
    shifted = count * (mean - pivot)
    return np.concatenate([[count], shifted, m2 + shifted * (mean - pivot)])


def combine(total: Statistics, pivot: Statistics) -> tuple[int, Statistics, Statistics]:
    """Count, mean and M2 of all values, from the sum of all contributions."""
    count = int(total[0])
    shift, square = total[1 : pivot.size + 1] / max(count, 1), total[pivot.size + 1 :]
    return count, pivot + shift, np.maximum(square - count * shift**2, 0.0)


@dataclass
class SyncNormCall:
    """One call of batch norm by the statistics of all ranks, from its forward pass to its backward pass.

    Args:
        shared: with whom.
        running_mean, running_variance: what every rank holds; the sums are taken about the mean.
        channels_last: where the channels of x stand.
        activation: fused after γ·x̂ + β + residual.
        epsilon: added to the variance.

    Attributes:
        count: values per channel, on all ranks together; set by the forward pass, as the others.
        mean, m2, inv_std: of all ranks' values, one per channel.
    """

    shared: Shared
    running_mean: Statistics
    running_variance: Statistics
    channels_last: bool
    activation: Activation
    epsilon: float
    count: int = 0
    mean: Statistics = field(default_factory=lambda: np.empty(0))
    m2: Statistics = field(default_factory=lambda: np.empty(0))
    inv_std: Statistics = field(default_factory=lambda: np.empty(0))

    @cached_property
    def pivot(self) -> Statistics:
        """The running mean, where it is a number."""
        return _finite(self.running_mean)

    def sum(self, values: Statistics, direction: Direction) -> Statistics:
        """The sum of ``values`` over the ranks.

        Raises:
            DistributedError: not every rank came, or they came with different things.
        """
        return self.shared.communicator.sum(values, self.operation(direction), self.shared.timeout)

    def operation(self, direction: Direction) -> Operation:
        """What is the same on every rank: another name, size, setting or moving statistic is a fault."""
        layer, channels = self.shared.layer, self.running_mean.size
        if direction != "forward":
            return Operation(layer, direction, channels)
        # Of the variance no other rank's result depends; but one that is not equal now never becomes so.
        held = zlib.crc32(_finite(self.running_variance).tobytes(), zlib.crc32(self.pivot.tobytes()))
        return Operation(layer, direction, channels, self.shared.settings, f"moving statistics {held:08x}")

    def take_total(self, total: Statistics) -> None:
        """Set the statistics, from the sum of all contributions.

        Raises:
            SingleValueError: one value per channel on all ranks together.
        """
        self.count, self.mean, self.m2 = combine(total, self.pivot)
        if self.count < 2:
            ranks = list(self.shared.communicator.ranks)
            raise SingleValueError(
                f"{self.shared.layer} got {self.count} values per channel on ranks {ranks} together, of which "
                "no variance exists; use a larger batch, eval() or GroupNorm, "
                "or single_value='passthrough' to hand x through as Paddle does"
            )
        self.inv_std = 1.0 / np.sqrt(self.m2 / self.count + self.epsilon)

    def update(self, mean: paddle.Tensor, variance: paddle.Tensor, spec: NormSpec) -> None:
        """``moving = momentum · moving + (1 - momentum) · batch``, in the memory of these buffers."""
        kernels.update_running(
            _vector(mean),
            _vector(variance),
            mean=self.mean,
            m2=self.m2,
            count=self.count,
            momentum=spec.momentum,
            unbiased=spec.unbiased,
        )

    def buffer(self, tensor: paddle.Tensor) -> Buffer:
        """How the kernels see a dense tensor shaped like x."""
        outer, *rest = tensor.shape
        channels = rest.pop(-1 if self.channels_last else 0)
        shape = (outer, channels, math.prod(rest))
        return Buffer(tensor.data_ptr(), dtype_name(tensor), shape, self.channels_last)

    def optional(self, tensor: paddle.Tensor | None) -> Buffer | None:
        """The same, for what there may not be."""
        return None if tensor is None else self.buffer(tensor)


def _finite(values: Statistics) -> Statistics:
    # NaN has many bit patterns, and ranks that are equal need not have the same.
    return np.where(np.isfinite(values), values, 0.0)


def normalize_shared(
    x: paddle.Tensor,
    weight: paddle.Tensor | None,
    bias: paddle.Tensor | None,
    residual: paddle.Tensor | None,
    call: SyncNormCall,
) -> paddle.Tensor:
    """``act(γ·x̂ + β + residual)`` by the kernels, differentiable once in every tensor."""
    return _SyncNorm.apply(x, weight, bias, residual, call)


def refuse_second_derivative(call: SyncNormCall) -> None:
    """Raise InputError in a backward pass whose result is to be differentiated."""
    if paddle.is_grad_enabled():
        raise InputError(
            f"{call.shared.layer} was asked for a gradient that can be differentiated again, which synchronised "
            "statistics do not have; leave out create_graph=True, or use BatchNorm or GroupNorm there"
        )


class _SyncNorm(PyLayer):
    @staticmethod
    def forward(
        ctx: Any,
        x: paddle.Tensor,
        weight: paddle.Tensor | None,
        bias: paddle.Tensor | None,
        residual: paddle.Tensor | None,
        call: SyncNormCall,
    ) -> paddle.Tensor:
        ctx.call = call
        dense, added = x.contiguous(), None if residual is None else residual.contiguous()
        y = empty_like(dense)
        seen = call.buffer(dense)
        mean, m2 = np.zeros((2, seen.shape[1]))
        count = kernels.batch_statistics(seen, mean, m2)
        call.take_total(call.sum(contribution(count, mean, m2, call.pivot), "forward"))
        kernels.batch_normalize(seen, call.buffer(y), residual=call.optional(added), **_settings(weight, bias, call))
        save(ctx, (x, weight, bias, residual), y, call.activation)
        return y

    @staticmethod
    def backward(ctx: Any, dy: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        call: SyncNormCall = ctx.call
        refuse_second_derivative(call)
        needed = wanted(ctx)
        x, weight, bias, residual, y = recall(ctx, parameters=True)
        x, dy = x.contiguous(), dy.contiguous()
        residual, y = (None if tensor is None else tensor.contiguous() for tensor in (residual, y))
        dx = empty_like(x) if needed[0] else None
        dresidual = empty_like(x) if needed[3] else None

        settings = _settings(weight, bias, call) | {"residual": call.optional(residual), "y": call.optional(y)}
        seen = call.buffer(dy), call.buffer(x)
        sum_dz, sum_dz_xhat = np.zeros((2, call.mean.size))
        kernels.batch_gradient_sums(*seen, sum_dz=sum_dz, sum_dz_xhat=sum_dz_xhat, **settings)
        # Also where no gradient for x is wanted here: another rank may want one.
        total = call.sum(np.concatenate([sum_dz, sum_dz_xhat]), "backward")
        settings["sum_dz"], settings["sum_dz_xhat"] = total[: sum_dz.size], total[sum_dz.size :]
        kernels.batch_input_gradient(*seen, call.optional(dx), call.optional(dresidual), count=call.count, **settings)
        dweight = _stored(sum_dz_xhat, weight) if needed[1] else None
        dbias = _stored(sum_dz, bias) if needed[2] else None
        each = zip((dx, dweight, dbias, dresidual), ctx.given, strict=True)
        return tuple(gradient for gradient, given in each if given)


def _settings(weight: paddle.Tensor | None, bias: paddle.Tensor | None, call: SyncNormCall) -> dict[str, Any]:
    return {
        "mean": call.mean,
        "inv_std": call.inv_std,
        "activation": call.activation,
        "weight": None if weight is None else _vector(weight),
        "bias": None if bias is None else _vector(bias),
    }


def _vector(tensor: paddle.Tensor) -> Vector:
    return Vector(tensor.data_ptr(), dtype_name(tensor), tensor.shape[0])


def _stored(values: Statistics, like: paddle.Tensor) -> paddle.Tensor:
    gradient = empty_like(like)
    kernels.store(values, _vector(gradient))
    return gradient
