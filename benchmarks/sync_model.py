"""What the collectives of a training step cost on p ranks: formulas for the sums, and a simulation of who waits.

A message of n bytes takes α + n/B: a latency α, and a bandwidth B (Hockney's model). With it, an all-reduce takes

==================  ========================================  ==========================================
recursive doubling  ⌊log₂ p⌋·(α + n/B)                        short vectors; ours
tree                2·⌈log₂ p⌉·(α + n/B)                      reduce to one rank, and broadcast
halving, doubling   2·⌊log₂ p⌋·α + 2·(p - 1)/p·n/B            Rabenseifner's, long vectors
ring                2·(p - 1)·α + 2·(p - 1)/p·n/B             gloo's
==================  ========================================  ==========================================

after Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19(1),
2005, without their γ, the time of the additions: 32 KiB, the longest vector here, are added in
microseconds. Where p is no power of two, the first and third take two more messages, which hand the surplus ranks'
vectors in and the sum out.

Ranks also wait for the slowest of them, in every collective instead of once per step. What lies between two
collectives is a draw from a log-normal distribution of given mean and deviation, on each rank by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "ALGORITHMS",
    "Network",
    "Stragglers",
    "fit",
    "layer_bytes",
    "messages",
    "sent_bytes",
    "simulate",
    "step_seconds",
]

Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Network:
    """A link between two ranks.

    Attributes:
        latency: α, seconds that a message takes however short it is.
        bandwidth: B, bytes per second.
    """

    latency: float
    bandwidth: float

    def message(self, size: float) -> float:
        """Seconds for one message of ``size`` bytes."""
        return self.latency + size / self.bandwidth


def _recursive_doubling(ranks: int, size: float, network: Network) -> float:
    return messages(ranks) * network.message(size)


def _tree(ranks: int, size: float, network: Network) -> float:
    return 2 * _rounds(ranks) * network.message(size)


def _halving_doubling(ranks: int, size: float, network: Network) -> float:
    power = 1 << _floor_log2(ranks)
    inner = 2 * _floor_log2(ranks) * network.latency + 2 * (power - 1) / power * size / network.bandwidth
    return inner + (0.0 if power == ranks else 2 * network.message(size))


def _ring(ranks: int, size: float, network: Network) -> float:
    return 2 * (ranks - 1) * network.message(size / ranks)


ALGORITHMS: dict[str, Callable[[int, float, Network], float]] = {
    "recursive doubling": _recursive_doubling,
    "tree": _tree,
    "halving, doubling": _halving_doubling,
    "ring": _ring,
}
"""Seconds of one all-reduce, from the number of ranks, the bytes of the vector, and the network."""


def messages(ranks: int) -> int:
    """How many messages follow each other in recursive doubling."""
    power = 1 << _floor_log2(ranks)
    return _floor_log2(ranks) + (0 if power == ranks else 2)


def _floor_log2(ranks: int) -> int:
    return ranks.bit_length() - 1


def _rounds(ranks: int) -> int:
    return (ranks - 1).bit_length()


def sent_bytes(length: int) -> float:
    """Bytes of the message that carries so many float64 values, four marks and a length."""
    return 8.0 * (length + 5)


def layer_bytes(channels: int) -> tuple[float, float]:
    """Bytes of the messages of a layer's forward sum, of 2·C sums and a count, and of its backward sum."""
    return sent_bytes(2 * channels + 1), sent_bytes(2 * channels)


def step_seconds(channels: Sequence[int], ranks: int, network: Network, algorithm: str = "recursive doubling") -> float:
    """The 2·L collectives of a training step with L layers of so many channels each."""
    reduce = ALGORITHMS[algorithm]
    return math.fsum(reduce(ranks, size, network) for each in channels for size in layer_bytes(each))


def fit(sizes: Array, seconds: Array) -> Network:
    """Latency and bandwidth of messages of these bytes: least squares of the relative error.

    Minimises Σ ((α + nᵢ/B - tᵢ)/tᵢ)²; without the division, the longest messages alone would decide.

    Raises:
        ValueError: fewer than two sizes, or times that do not grow with them.
    """
    if np.unique(sizes).size < 2:
        raise ValueError(f"{np.unique(sizes).size} sizes cannot tell latency from bandwidth; measure two at least")
    design = np.stack([1 / seconds, sizes / seconds], axis=1)
    (latency, per_byte), *_ = np.linalg.lstsq(design, np.ones_like(seconds), rcond=None)
    if not (latency > 0 and per_byte > 0):
        raise ValueError(f"latency {latency:g} s and {per_byte:g} s/byte fit best; measure longer, on a quiet machine")
    return Network(float(latency), float(1 / per_byte))


@dataclass(frozen=True)
class Stragglers:
    """Expected seconds of a training step's computation on ranks that wait for each other.

    Attributes:
        alone: of one rank that waits for nobody.
        once: of the slowest rank: what ranks need that wait once, at the end (BatchNorm under DataParallel).
        each: if they wait for the slowest in every collective (SyncBatchNorm).
    """

    alone: float
    once: float
    each: float

    @property
    def waiting(self) -> float:
        """What waiting in every collective costs a rank, beside its own computation."""
        return self.each - self.alone

    @property
    def added(self) -> float:
        """What it costs beside waiting once."""
        return self.each - self.once


def simulate(means: Array, deviations: Array, ranks: int, *, draws: int = 200, seed: int = 0) -> Stragglers:
    """Expected maxima over ranks, of steps whose parts take log-normal times.

    Args:
        means: seconds of each part between two collectives.
        deviations: standard deviations of them, over ranks and steps.
        ranks: how many wait for each other.
        draws: steps that are simulated.
        seed: of the draws.
    """
    random = np.random.default_rng(seed)
    spread = np.log1p((deviations / means) ** 2)
    location = np.log(means) - spread / 2
    alone = once = each = 0.0
    for _ in range(draws):
        times = random.lognormal(location, np.sqrt(spread), (ranks, means.size))
        alone += float(times.sum(1).mean())
        once += float(times.sum(1).max())
        each += float(times.max(0).sum())
    return Stragglers(alone / draws, once / draws, each / draws)
