"""What each of four ranks does in test_faults.py: one fault after another, each in ranks of its own."""

from __future__ import annotations

import json
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

TIMEOUT = 30.0  # for ranks that do come, on a machine that has other things to do


def layer_of(channels: int, ranks: list[int], timeout: float = TIMEOUT) -> fw.SyncBatchNorm:
    """A layer of the name that its number among the fault's layers gives it, whatever ranks did before."""
    return fw.SyncBatchNorm(channels, process_group=ranks, timeout=timeout)


def forward(layer: fw.SyncBatchNorm) -> paddle.Tensor:
    x = paddle.randn([2, layer._mean.shape[0], 3])
    x.stop_gradient = False
    return layer(x)


def other_channels(rank: int) -> None:
    """Ranks 0 and 1 bring vectors that gloo would sum: their lengths round to one."""
    forward(layer_of(8 if rank == 0 else 9, [0, 1]))


def many_other_channels(rank: int) -> None:
    """Ranks 2 and 3 bring vectors at which gloo would abort a process."""
    forward(layer_of(8 if rank == 2 else 400, [2, 3]))


def skipped_layer(rank: int) -> None:
    """Rank 0 leaves out the second of three layers of one width."""
    layers = [layer_of(8, [0, 2]) for _ in range(3)]
    forward(layers[0])
    if rank != 0:
        forward(layers[1])
    forward(layers[2])


def other_statistics(rank: int) -> None:
    """Rank 3 has another running mean than rank 0, as plain batch norm leaves it under DataParallel."""
    layer = layer_of(8, [0, 3])
    layer._mean.set_value(np.full(8, float(rank), "float32"))
    forward(layer)


def missing_rank(rank: int) -> None:
    """Rank 1 waits for rank 3, which lives, but is elsewhere."""
    forward(layer_of(8, [1, 3]))
    impatient = layer_of(8, [1, 3], timeout=2.0)
    if rank == 1:
        forward(impatient)


def killed_rank(rank: int) -> None:
    """Rank 1 is killed between the directions of a layer that has been seen to work."""
    layer = layer_of(8, [0, 1, 2, 3], timeout=60.0)
    forward(layer).sum().backward()
    y = forward(layer)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    y.sum().backward()


FAULTS: tuple[tuple[Callable[[int], None], tuple[int, ...]], ...] = (
    (other_channels, (0, 1)),
    (many_other_channels, (2, 3)),
    (skipped_layer, (0, 2)),
    (other_statistics, (0, 3)),
    (missing_rank, (1, 3)),
    (killed_rank, (0, 1, 2, 3)),
)


def main(folder: str) -> None:
    distributed.init_parallel_env()
    rank = distributed.get_rank()
    for fault, ranks in FAULTS:
        if rank not in ranks:
            continue
        started = time.monotonic()
        try:
            with paddle.utils.unique_name.guard():
                fault(rank)
        except Exception as error:  # from a backward pass, Paddle's own with ours in its text
            seen = {"kind": type(error).__name__, "text": str(error)}
        else:
            seen = {"kind": "none", "text": ""}
        text = json.dumps({**seen, "seconds": time.monotonic() - started})
        Path(folder, f"{fault.__name__}.{rank}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
