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


def other_variance(rank: int) -> None:
    """Rank 1 has another running variance, on which no other rank's result depends: only ``eval()`` would tell."""
    layer = layer_of(8, [0, 1, 2])
    layer._variance.set_value(np.full(8, 2.0 if rank == 1 else 1.0, "float32"))
    forward(layer)


def other_settings(rank: int) -> None:
    """Rank 3 has another epsilon, momentum and activation."""
    other = {"epsilon": 1e-3, "momentum": 0.5, "act": "relu"} if rank == 3 else {}
    forward(fw.SyncBatchNorm(8, process_group=[0, 1, 3], timeout=TIMEOUT, **other))


def foreign_group(rank: int) -> None:
    """Both ranks have a layer of the other one alone."""
    forward(layer_of(8, [5 - rank]))


def missing_rank(rank: int) -> None:
    """Rank 1 waits for rank 3, which lives, but is elsewhere."""
    forward(layer_of(8, [1, 3]))
    impatient = layer_of(8, [1, 3], timeout=2.0)
    if rank == 1:
        forward(impatient)


def stopped_rank(rank: int) -> None:
    """Rank 2 is stopped, as by a debugger, and goes on when rank 1 has given up."""
    layer = layer_of(8, [1, 2], timeout=60.0)
    forward(layer)
    layer._timeout = 4.0
    if rank == 2:
        parent = os.getpid()
        beside(lambda: os.kill(parent, signal.SIGCONT), reported("stopped_rank", 1))
        os.kill(parent, signal.SIGSTOP)
    forward(layer)  # for which rank 1 has sent its part before it gave up
    forward(layer)


def killed_rank(rank: int) -> None:
    """Rank 1 is killed between the directions of a layer that has been seen to work; what it has forked lives on."""
    layer = layer_of(8, [0, 1, 2, 3], timeout=60.0)
    forward(layer).sum().backward()
    y = forward(layer)
    if rank == 1:
        beside(lambda: None, reported("killed_rank", 0))  # as a data loader's worker does
        os.kill(os.getpid(), signal.SIGKILL)
    y.sum().backward()


FAULTS: tuple[tuple[Callable[[int], None], tuple[int, ...]], ...] = (
    (other_channels, (0, 1)),
    (many_other_channels, (2, 3)),
    (skipped_layer, (0, 2)),
    (other_statistics, (0, 3)),
    (other_variance, (0, 1, 2)),
    (other_settings, (0, 1, 3)),
    (foreign_group, (2, 3)),
    (stopped_rank, (1, 2)),
    (missing_rank, (1, 3)),
    (killed_rank, (0, 1, 2, 3)),
)


def reported(fault: str, rank: int) -> Path:
    """Where a rank writes what it saw of a fault."""
    return Path(sys.argv[1], f"{fault}.{rank}.json")


def beside(action: Callable[[], None], when: Path) -> None:
    """Fork a process that waits for a file, for a minute at most, and does something then."""
    if os.fork():
        return
    os.closerange(1, 3)  # or whoever reads this rank's output would wait for it
    for _ in range(600):
        if when.exists():
            break
        time.sleep(0.1)
    action()
    os._exit(0)


def main() -> None:
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
        reported(fault.__name__, rank).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
