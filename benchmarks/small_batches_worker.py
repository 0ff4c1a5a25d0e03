"""One real rank of :mod:`benchmarks.small_batches_proof`: training steps on its share of the batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
import paddle.nn.functional as F
from paddle import distributed, nn

import flatwater.paddle as fw
from benchmarks.small_batches_model import Network
from benchmarks.worker import serve

__all__ = ["NORMS", "Arrays", "train_steps"]

NORMS: dict[str, Callable[[int], nn.Layer]] = {
    "batch_norm": partial(fw.BatchNorm2D, act="relu"),
    "sync_batch_norm": partial(fw.SyncBatchNorm, act="relu"),
}

Arrays = dict[str, npt.NDArray[Any]]


def train_steps(norm: Callable[[int], nn.Layer], batches: Arrays, rate: float, begin: Arrays | None = None) -> Arrays:
    """Steps of SGD, one on each batch, under DataParallel where there are ranks.

    Args:
        norm: makes norm and ReLU.
        batches: ``images`` and ``labels``, with a first axis for the steps.
        rate: the learning rate.
        begin: weights with which each step begins; by default those that the step before it left.

    Returns:
        ``losses``, and the weights before the first step and after each.
    """
    paddle.seed(0)
    network = Network(norm)
    parameters = {name: each for name, each in network.named_parameters() if not each.stop_gradient}
    model = paddle.DataParallel(network) if distributed.is_initialized() else network
    optimizer = paddle.optimizer.SGD(rate, [*parameters.values()])
    found: dict[str, list[npt.NDArray[Any]]] = {name: [each.numpy()] for name, each in parameters.items()}
    losses = []
    for step, (images, labels) in enumerate(zip(batches["images"], batches["labels"], strict=True)):
        if begin is not None:
            for name, each in parameters.items():
                each.set_value(begin[name][step])
        loss = F.cross_entropy(model(paddle.to_tensor(images)), paddle.to_tensor(labels))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(loss.item())
        for name, each in parameters.items():
            found[name].append(each.numpy())
    return {name: np.stack(each) for name, each in found.items()} | {"losses": np.array(losses)}


def start() -> None:
    """Join the world."""
    distributed.init_parallel_env()


def run(norm: str, rate: float, folder: str) -> None:
    """Steps with this rank's share of ``batches.npz``, from the weights in ``emulated.npz``; results beside them."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    batches = {name: each[:, rank::ranks] for name, each in np.load(Path(folder) / "batches.npz").items()}
    begin = dict(np.load(Path(folder) / "emulated.npz"))
    np.savez(Path(folder) / f"{rank}.npz", **train_steps(NORMS[norm], batches, rate, begin))


if __name__ == "__main__":
    serve({"start": start, "run": run})
