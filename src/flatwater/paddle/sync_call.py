"""One call of synchronised batch norm: the kernels' halves, and between them one sum over the ranks.

The forward pass sums, for each channel, over ranks r with n_r values of mean m_r and M2_r = Σ(x - m_r)²,

    N = Σ n_r        S = Σ n_r·(m_r - c)        Q = Σ (M2_r + n_r·(m_r - c)²)
    mean = c + S/N                              M2 = Q - S²/N

about a pivot c, the running mean, which every rank holds. All is float64. M2 loses by the subtraction at most
about ((mean - c)/deviation)²·2⁻⁵³ of itself: 1e-8 where the mean is 10⁴ deviations from the pivot, as in the
first step of a layer whose running mean is still 0, and nothing to speak of once it has followed.

The backward pass sums Σdz and Σdz·x̂. A rank without values brings zeros to both, and waits like the others.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from flatwater import kernels
from flatwater.errors import SingleValueError
from flatwater.kernels import Buffer, Statistics
from flatwater.paddle.calls import BatchNormCall
from flatwater.paddle.collectives import Communicator, Direction, Operation

__all__ = ["Shared", "SyncBatchNormCall", "combine", "contribution"]


@dataclass(frozen=True)
class Shared:
    """With whom statistics are shared.

    Attributes:
        communicator: the ranks.
        layer: how the layer is called in messages.
        timeout: seconds to wait for the other ranks.
    """

    communicator: Communicator
    layer: str
    timeout: float

    def sum(self, values: Statistics, direction: Direction, channels: int, pivot: int = 0) -> Statistics:
        """The sum of ``values`` over the ranks."""
        return self.communicator.sum(values, Operation(self.layer, direction, channels, pivot), self.timeout)


def contribution(count: int, mean: Statistics, m2: Statistics, pivot: Statistics) -> Statistics:
    """What a rank brings to the forward's sum: n, n·(m - c) for each channel, M2 + n·(m - c)² for each."""
    shifted = count * (mean - pivot)
    return np.concatenate([[count], shifted, m2 + shifted * (mean - pivot)])


def combine(total: Statistics, pivot: Statistics) -> tuple[int, Statistics, Statistics]:
    """Count, mean and M2 of all values, from the sum of all contributions."""
    count = int(total[0])
    shift, square = np.split(total[1:], 2)
    shift = shift / max(count, 1)
    return count, pivot + shift, np.maximum(square - count * shift**2, 0.0)


@dataclass(kw_only=True)
class SyncBatchNormCall(BatchNormCall):
    """A call of batch norm whose statistics are those of all ranks.

    Attributes:
        shared: with whom.
        pivot: of the forward's sums, the same on every rank.
    """

    shared: Shared
    pivot: Statistics

    @classmethod
    def over_ranks(cls, shared: Shared, running_mean: Statistics, **settings: Any) -> SyncBatchNormCall:
        """A call that takes its statistics from the batches of all ranks; ``running_mean`` must agree on them."""
        pivot = np.where(np.isfinite(running_mean), running_mean, 0.0).astype(np.float64)
        mean, inv_std, m2 = np.zeros((3, pivot.size))
        return cls(mean=mean, inv_std=inv_std, m2=m2, shared=shared, pivot=pivot, **settings)

    def forward(self, x: Buffer, y: Buffer, **settings: Any) -> None:
        """Fill ``y`` and the statistics.

        Raises:
            DistributedError: not every rank came, or they came with different things.
            SingleValueError: one value per channel on all ranks together.
        """
        count = kernels.batch_statistics(x, self.mean, self.m2)
        mine = contribution(count, self.mean, self.m2, self.pivot)
        total = self.shared.sum(mine, "forward", self.pivot.size, zlib.crc32(self.pivot.tobytes()))
        self.count, self.mean, self.m2 = combine(total, self.pivot)
        if self.count < 2:
            ranks = list(self.shared.communicator.ranks)
            raise SingleValueError(
                f"{self.shared.layer} got {self.count} values per channel on ranks {ranks} together, of which "
                " no variance exists; use a larger batch, eval() or GroupNorm"
            )
        self.inv_std = 1.0 / np.sqrt(self.m2 / self.count + self.epsilon)
        kernels.batch_normalize(x, y, mean=self.mean, inv_std=self.inv_std, activation=self.activation, **settings)

    def backward(self, dy: Buffer, x: Buffer, dx: Buffer | None, dresidual: Buffer | None, **settings: Any) -> None:
        """Fill ``dx`` and ``dresidual``, where they are wanted, and this rank's own sums.

        Raises:
            DistributedError: not every rank came, or they came with different things.
        """
        settings |= {"mean": self.mean, "inv_std": self.inv_std, "activation": self.activation}
        kernels.batch_gradient_sums(dy, x, **settings)
        mine = np.concatenate([settings["sum_dz"], settings["sum_dz_xhat"]])
        # Also where no gradient for x is wanted here: another rank may want one.
        total = self.shared.sum(mine, "backward", self.pivot.size)
        settings["sum_dz"], settings["sum_dz_xhat"] = np.split(total, 2)
        kernels.batch_input_gradient(dy, x, dx, dresidual, count=self.count, **settings)
