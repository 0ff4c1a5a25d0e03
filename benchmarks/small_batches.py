"""What statistics of small per-device batches do to accuracy: ``python -m benchmarks.small_batches``.

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
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import paddle
import paddle.nn.functional as F
from rich.console import Console

import flatwater.paddle as fw
from benchmarks import machine
from benchmarks.small_batches_data import FOLDER, Data, Split, batches, load
from benchmarks.small_batches_model import MOMENTA, Network, RankBatchNorm, deployed
from benchmarks.small_batches_proof import prove
from benchmarks.small_batches_report import label, proofs, results
from flatwater import host
from flatwater.files import write_whole

__all__ = ["ARMS", "BATCH", "Run", "accuracy", "best_rates", "train"]

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
    """Of each arm the learning rate with the highest accuracy on the validation images."""
    best: dict[str, Run] = {}
    for run in runs:
        if run.arm not in best or run.validation > best[run.arm].validation:
            best[run.arm] = run
    return {arm: run.rate for arm, run in best.items()}


Key = tuple[str, int, float, int]


def _sweep() -> list[Key]:
    """One epoch of seed 0 with each learning rate."""
    return [(arm, SEEDS[0], rate, 1) for arm in ARMS for rate in RATES]


def _finals(rates: dict[str, float], epochs: int) -> list[Key]:
    return [(arm, seed, rates[arm], epochs) for seed in SEEDS for arm in ARMS]


_data: Data


def _initialize(folder: Path) -> None:
    global _data
    _data = load(folder)


def _train(key: Key) -> Run:
    return train(_data, *key)


def _trained(keys: Iterable[Key], folder: Path, jobs: int) -> Iterator[Run]:
    """The trainings, as they end; each in one of ``jobs`` processes of one thread."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), _initialize, (folder,)) as pool:
        for future in as_completed([pool.submit(_train, key) for key in keys]):
            yield future.result()


@click.command("small_batches", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data", "folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True)
@click.option(
    "--json",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Results; goes on with what is there.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=EPOCHS, show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count(), show_default="one a processor")
@click.option("--trainings", type=click.IntRange(min=0), help="Stop after so many; call again to go on.")
def command(folder: Path, target: Path, epochs: int, jobs: int, trainings: int | None) -> None:
    """Train with every norm and every seed, hold the emulated ranks against real ones, and print the table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if host.missing(os.environ):
        host.launch([sys.executable, "-m", "benchmarks.small_batches", *sys.argv[1:]])
    load(folder)  # so that a missing file is told before anything starts
    document: dict[str, Any] = {"runs": [], "proofs": []}
    if target.exists():
        document = json.loads(target.read_text(encoding="utf-8"))
    document["machine"] = machine.describe()
    runs = [Run(**run) for run in document["runs"]]
    console = Console()

    def keep() -> None:
        document["runs"] = [asdict(run) for run in runs]
        write_whole(target, json.dumps(document, indent=1, ensure_ascii=False) + "\n")

    def do(keys: list[Key]) -> bool:
        """Whether all of them are done."""
        nonlocal trainings
        done = {run.key for run in runs}
        missing = [key for key in keys if key not in done]
        now = missing if trainings is None else missing[:trainings]
        for run in _trained(now, folder, jobs):
            runs.append(run)
            keep()
            console.print(
                f"{label(run.arm, BATCH)}, seed {run.seed}, learning rate {run.rate:g}, {run.epochs} epochs: "
                f"{run.validation:.2%} of the validation images",
                soft_wrap=True,
                highlight=False,
            )
        trainings = None if trainings is None else trainings - len(now)
        return len(now) == len(missing)

    if not document["proofs"]:
        document["proofs"] = [asdict(proof) for proof in prove(load(folder).train)]
        keep()
    if not do(_sweep()):
        return
    swept = set(_sweep())
    rates = best_rates(run for run in runs if run.key in swept)
    if not do(finals := _finals(rates, epochs)):
        return
    chosen = [asdict(run) for run in runs if run.key in set(finals)]
    console.print(results(chosen, BATCH))
    console.print(proofs(document["proofs"]))


if __name__ == "__main__":
    command()
