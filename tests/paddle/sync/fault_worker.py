"""What each of three ranks does in test_faults.py: one fault after another, each in ranks of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
from paddle import distributed

import flatwater.paddle as fw
from flatwater.errors import DistributedError

TIMEOUT = 6.0


def layer_of(channels: int, ranks: list[int], timeout: float = TIMEOUT) -> fw.SyncBatchNorm:
    """A layer of the name that its number among the fault's layers gives it, whatever ranks did before."""
    return fw.SyncBatchNorm(channels, process_group=ranks, timeout=timeout)


def forward(layer: fw.SyncBatchNorm) -> paddle.Tensor:
    x = paddle.randn([2, layer._mean.shape[0], 3])
    x.stop_gradient = False
    return layer(x)


def other_channels(rank: int) -> None:
    """Rank 1 has another width of the same lane, then a rank would have another lane."""
    forward(layer_of(8 if rank == 0 else 9, [0, 1]))


def other_lane(rank: int) -> None:
    forward(layer_of(8 if rank == 1 else 400, [1, 2]))


def skipped_layer(rank: int) -> None:
    """Rank 0 leaves out the second of three layers of one width."""
    layers = [layer_of(8, [0, 2]) for _ in range(3)]
    forward(layers[0])
    if rank != 0:
        forward(layers[1])
    forward(layers[2])


def stays_away(rank: int) -> None:
    """Everybody normalizes, and one rank leaves it at that."""
    layer = layer_of(8, [0, 1, 2], timeout=2.0)
    forward(layer)
    if rank != 2:
        forward(layer)


def dies(rank: int) -> None:
    """Rank 1 is killed between the directions of a layer, when it has been seen to work."""
    layer = layer_of(8, [0, 1, 2], timeout=60.0)
    y = forward(layer)
    y.sum().backward()
    y = forward(layer)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    y.sum().backward()


def main(folder: str, faults: str) -> None:
    distributed.init_parallel_env()
    rank = distributed.get_rank()
    for name, members in (part.split(":") for part in faults.split(",")):
        if str(rank) not in members:
            continue
        fault: Callable[[int], None] = globals()[name]
        started = time.monotonic()
        try:
            with paddle.utils.unique_name.guard():
                fault(rank)
        except DistributedError as error:
            text = str(error)
        else:
            text = "no error"
        results = np.array([time.monotonic() - started, text], object)
        np.save(Path(folder) / f"{name}.{rank}.npy", results, allow_pickle=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
