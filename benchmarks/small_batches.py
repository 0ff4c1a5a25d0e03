"""What statistics of small per-device batches do to accuracy: ``python -m benchmarks small-batches``.

The total batch is the same everywhere, and so are weights at the start, images and their order. What differs is over
how many samples a norm takes its statistics: a rank's share of the batch (batch norm under DataParallel), all of it
(SyncBatchNorm, or one device), or none (group norm).

Ranks with statistics of their own are emulated in one process (:class:`benchmarks.small_batches_model.RankBatchNorm`),
and SyncBatchNorm over any number of ranks is batch norm over the whole batch; both are held against real processes,
step by step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F

import flatwater.paddle as fw
from benchmarks import machine
from benchmarks.small_batches_data import Data, Split, batches, load
from benchmarks.small_batches_model import MOMENTA, Network, RankBatchNorm, deployed
from benchmarks.small_batches_proof import prove
from benchmarks.small_batches_report import label
from flatwater.files import write_whole

__all__ = ["ARMS", "BATCH", "EPOCHS", "Run", "accuracy", "best_rates", "measure", "train"]

BATCH = 32
RATES = (0.03, 0.1, 0.3)
SEEDS = (0, 1, 2)
EPOCHS = 3
GROUPS = 8
RECALIBRATION = 10_000
"""Training images that statistics are computed from anew."""

ARMS = {f"batch {BATCH // ranks}": ranks for ranks in (1, 2, 4, 8, 16)} | {"group": 0}
"""Ranks that share the batch and take their statistics apart; 0 is group norm."""


@dataclass(frozen=True)
class Run:
    """One training: the share of images that it gets right.

    Attributes:
        arm: one of :data:`ARMS`.
        seed: of weights, order and shifts.
        rate: the highest learning rate.
        epochs: how many.
        validation: accuracy on the validation images.
        test: on the test images, by what ``eval()`` normalizes with.
    """

    arm: str
    seed: int
    rate: float
    epochs: int
    validation: float
    test: dict[str, float]

    @property
    def key(self) -> tuple[str, int, float, int]:
        """Which training it was."""
        return self.arm, self.seed, self.rate, self.epochs


def train(data: Data, arm: str, seed: int, rate: float, epochs: int) -> Run:
    """Train one network with momentum SGD, the learning rate falling to 0 on a half cosine, and test it."""
    ranks = ARMS[arm]
    paddle.seed(seed)
    network = Network(
        partial(RankBatchNorm, ranks=ranks) if ranks else lambda width: fw.GroupNorm(GROUPS, width, act="relu")
    )
    steps = epochs * (len(data.train[0]) // BATCH)
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(rate, steps)
    optimizer = paddle.optimizer.Momentum(schedule, 0.9, network.parameters(), weight_decay=5e-4)
    for epoch in range(epochs):
        for images, labels in batches(data.train, BATCH, seed, epoch):
            F.cross_entropy(network(paddle.to_tensor(images)), paddle.to_tensor(labels)).backward()
            optimizer.step()
            optimizer.clear_grad()
            schedule.step()
    if not ranks:
        network.eval()
        return Run(arm, seed, rate, epochs, accuracy(network, data.validation), {"": accuracy(network, data.test)})
    plain = {f"m = {momentum}": deployed(network, momentum) for momentum in MOMENTA}
    plain["m = 0.9, rank 0's own"] = deployed(network, 0.9, averaged=False)
    plain["recalibrated"] = deployed(network, 0.9)
    images = data.train[0][:RECALIBRATION]
    loader = (paddle.to_tensor(images[start : start + 500]) for start in range(0, len(images), 500))
    fw.recalibrate(plain["recalibrated"], loader, progress=False)
    test = {name: accuracy(each, data.test) for name, each in plain.items()}
    return Run(arm, seed, rate, epochs, accuracy(plain["m = 0.9"], data.validation), test)


def accuracy(network: paddle.nn.Layer, split: Split) -> float:
    """The share of images whose class the network, in ``eval()``, gives the highest score."""
    images, labels = split
    with paddle.no_grad():
        right = [
            np.sum(
                network(paddle.to_tensor(images[start : start + 500])).numpy().argmax(1) == labels[start : start + 500]
            )
            for start in range(0, len(images), 500)
        ]
    return float(np.sum(right) / len(images))


def best_rates(runs: Iterable[Run]) -> dict[str, float]:
    """Of each arm the learning rate with the highest accuracy on the validation images, as a mean over its seeds."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        found.setdefault(run.arm, {}).setdefault(run.rate, []).append(run.validation)
    return {arm: max(rates, key=lambda rate: np.mean(rates[rate])) for arm, rates in found.items()}


Key = tuple[str, int, float, int]


_data: Data


def _initialize(folder: Path) -> None:
    global _data
    _data = load(folder)


def _train(key: Key) -> Run:
    return train(_data, *key)


def _trained(keys: Iterable[Key], folder: Path) -> Iterator[Run]:
    """The trainings, as they end: one on each processor at a time, in a process of one thread."""
    with (
        _environment(OMP_NUM_THREADS="1"),
        ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _initialize, (folder,)) as pool,
    ):
        try:
            for future in as_completed([pool.submit(_train, key) for key in keys]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, what has not begun shall not


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """What processes that begin meanwhile find set."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def measure(
    folder: Path, store: Path, *, epochs: int, trainings: int | None, progress: Callable[[str], object]
) -> dict[str, Any]:
    """Hold the emulated ranks against real ones, and train every arm with every learning rate and seed.

    Args:
        folder: Fashion-MNIST.
        store: JSON file that gets each training when it ends, and is gone on with when there is one.
        epochs: of each training.
        trainings: stop after so many; None for all.
        progress: is told what is being done.

    Returns:
        ``batch``, ``proofs``, ``runs`` (as far as done), ``rates`` (of each arm the one that counts), and of
        ``missing`` trainings the number.
    """
    data = load(folder)  # so that a missing file is told before anything starts
    document: dict[str, Any] = {"runs": [], "proofs": []}
    if store.exists():
        document = json.loads(store.read_text(encoding="utf-8"))
    document["machine"] = machine.describe()
    runs = {run.key: run for run in (Run(**row) for row in document["runs"])}

    def keep() -> None:
        document["runs"] = [asdict(run) for run in runs.values()]
        store.parent.mkdir(parents=True, exist_ok=True)
        write_whole(store, json.dumps(document, indent=1, ensure_ascii=False) + "\n")

    if not document["proofs"]:
        progress("small batches: emulated ranks beside real ones")
        document["proofs"] = [asdict(proof) for proof in prove(data.train)]
        keep()
    keys = [(arm, seed, rate, epochs) for seed in SEEDS for arm in ARMS for rate in RATES]
    now = [key for key in keys if key not in runs][:trainings]
    progress(f"small batches: {len(now)} trainings")
    for done, run in enumerate(_trained(now, folder) if now else (), 1):
        runs[run.key] = run
        keep()
        progress(f"small batches: {done} of {len(now)}, last {label(run.arm, BATCH)}: {run.validation:.2%}")
    found = [runs[key] for key in keys if key in runs]
    return {
        "batch": BATCH,
        "proofs": document["proofs"],
        "runs": [asdict(run) for run in found],
        "rates": best_rates(found),
        "missing": len(keys) - len(found),
    }
