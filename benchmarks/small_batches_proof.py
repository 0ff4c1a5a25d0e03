"""The emulated ranks of :mod:`benchmarks.small_batches` held against real processes, step by step."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.small_batches_data import Split, batches
from benchmarks.small_batches_model import RankBatchNorm
from benchmarks.small_batches_worker import NORMS, Arrays, train_steps
from benchmarks.sync_world import World

__all__ = ["Proof", "prove"]

WORLDS = (2, 4)
STEPS = 30
RATE = 0.1


@dataclass(frozen=True)
class Proof:
    """The largest differences in so many steps: of losses, and of the weights after each by the largest weight.

    Each step begins with the same weights. Otherwise the first value that rounding puts on the other side of ReLU's
    corner would set two trainings apart, however equal they are.
    """

    ranks: int
    norm: str
    steps: int
    loss: float
    weights: float


def prove(train: Split, share: int = 2) -> list[Proof]:
    """Train for :data:`STEPS` steps in this process as if in worlds of several, and repeat each in real ones.

    Args:
        train: images and labels.
        share: samples of each rank's batch.
    """
    proofs = []
    for ranks in WORLDS:
        drawn = [batch for batch, _ in zip(batches(train, ranks * share, 0, 0), range(STEPS), strict=False)]
        images, labels = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
        given: Arrays = {"images": images, "labels": labels}
        with tempfile.TemporaryDirectory() as folder, World(ranks, "small_batches_worker") as world:
            np.savez(Path(folder) / "batches.npz", **given)
            for norm in NORMS:
                apart = ranks if norm == "batch_norm" else 1
                emulated = train_steps(partial(RankBatchNorm, ranks=apart), given, RATE)
                np.savez(Path(folder) / "emulated.npz", **emulated)
                world.call("run", norm=norm, rate=RATE, folder=folder)
                real = [dict(np.load(Path(folder) / f"{rank}.npz")) for rank in range(ranks)]
                proofs.append(_compare(ranks, norm, real, emulated))
    return proofs


def _compare(ranks: int, norm: str, real: list[Arrays], emulated: Arrays) -> Proof:
    losses = np.mean([rank["losses"] for rank in real], 0)
    weights = [name for name in emulated if name != "losses"]
    largest = max(float(np.abs(emulated[name]).max()) for name in weights)
    apart = max(float(np.abs(rank[name] - emulated[name]).max()) for rank in real for name in weights)
    return Proof(ranks, norm, len(losses), float(np.abs(losses - emulated["losses"]).max()), apart / largest)
