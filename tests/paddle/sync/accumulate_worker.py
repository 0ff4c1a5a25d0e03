"""One rank that accumulates statistics over micro-batches; results go to FOLDER/rank.npz or to the output."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

import flatwater.paddle as fw
from flatwater.errors import DistributedError


def micro_batches(rank: int) -> list[np.ndarray]:
    """Two on each rank, of unequal sizes and means; the second of the last rank is empty."""
    generator = np.random.default_rng(rank)
    sizes = ((4, 2), (3, 5), (2, 0))[rank]
    return [generator.normal(1e3 * rank + index, 1.0, (size, 3)).astype("float32") for index, size in enumerate(sizes)]


def model_of(world: int) -> nn.Sequential:
    """A norm of all ranks, a norm of the first two and of the others, and a norm of each rank."""
    rank = paddle.distributed.get_rank()
    group = [0, 1] if rank < 2 else list(range(2, world))
    return nn.Sequential(fw.SyncBatchNorm(3), fw.SyncBatchNorm(3, process_group=group), fw.BatchNorm1D(3))


def pool(folder: Path, rank: int) -> None:
    model = model_of(paddle.distributed.get_world_size())
    with fw.accumulate_statistics(model) as accumulated:
        for batch in micro_batches(rank):
            for layer in model:
                if len(batch) or isinstance(layer, fw.SyncBatchNorm):
                    layer(paddle.to_tensor(batch))
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    np.savez(folder / f"{rank}.npz", **state, counts=np.array(list(accumulated.counts.values())))


def fail(folder: Path, rank: int) -> None:
    """Rank 1 leaves the block by an exception; rank 0 waits for it at the end, but not for ever."""
    model = nn.Sequential(fw.SyncBatchNorm(3, timeout=2))
    before = [tensor.numpy().tobytes() for tensor in model.state_dict().values()]
    try:
        with fw.accumulate_statistics(model):
            model(paddle.to_tensor(micro_batches(rank)[0]))
            if rank == 1:
                raise ValueError("gave up")
    except ValueError as error:
        print(f"rank {rank}: {error}")
        time.sleep(4)  # a process that ended would be another fault
    except DistributedError as error:
        print(f"rank {rank}: DistributedError: {error}")
    assert [tensor.numpy().tobytes() for tensor in model.state_dict().values()] == before


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    paddle.distributed.init_parallel_env()
    {"pool": pool, "fail": fail}[sys.argv[1]](Path(sys.argv[2]), paddle.distributed.get_rank())
