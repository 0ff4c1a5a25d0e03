"""The processes of a training that several take part in, started by ``python -m paddle.distributed.launch``.

The batch of a step is the one that a single process would read. Each rank makes every n-th of its lines, and weighs
its loss by its share, so that DataParallel's average of the gradients is the gradient of the whole batch's loss: with
sync batch norm a training is the same on any number of ranks, but for rounding, learning rate included.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import distributed

import flatwater.paddle as fw
from flatwater.errors import ConfigError
from flatwater.paddle.sync.collectives import Operation, communicator_of
from flatwater.paddle.sync.groups import world_ranks
from flatwater.recipes.ocr.config import Config

__all__ = ["World"]

_ADVICE = (
    "go on from the last checkpoint with --resume; if rank 0 takes longer than that to evaluate or to write, "
    "raise train.timeout"
)


@dataclass(frozen=True)
class World:
    """The place of this process among those that train together; of one, nothing is shared and nobody is waited for."""

    rank: int = 0
    size: int = 1
    timeout: float = 60.0

    @classmethod
    def join(cls, config: Config) -> World:
        """Meet the other ranks that Paddle's launcher started, if it did.

        Raises:
            ConfigError: there are more ranks than lines in the smallest batch.
            DistributedError: a rank did not come, or has another configuration.
        """
        size = int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))
        if size == 1:
            return cls()
        lines = config.smallest_batch
        if lines < size:
            raise ConfigError(
                f"train.batch_characters={config.train.batch_characters} makes batches of {lines} lines where they are "
                f"{config.data.max_length} characters long, too few for {size} ranks; "
                f"give at least {size * config.data.max_length}, or start fewer ranks"
            )
        if not paddle.device.is_compiled_with_cuda():
            os.environ.setdefault("PADDLE_DISTRI_BACKEND", "gloo")
        distributed.init_parallel_env()
        world = cls(distributed.get_rank(), size, config.train.timeout)
        world.sum("the start", [], f"configuration {zlib.crc32(config.to_yaml().encode()):08x}")
        return world

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.rank == 0

    def parallel(self, model: paddle.nn.Layer) -> paddle.nn.Layer:
        """The model, or what averages its gradients over the ranks."""
        return model if self.size == 1 else paddle.DataParallel(model)

    def sum(self, what: str, values: Sequence[float], detail: str = "") -> list[float]:
        """The sum of each of these numbers over the ranks.

        Args:
            what: they are, for messages; with ``detail`` the same on all ranks.

        Raises:
            DistributedError: a rank died, did not come, or came with something else.
        """
        if self.size == 1:
            return list(values)
        communicator = communicator_of(world_ranks(None), None, paddle.CPUPlace())
        operation = Operation(what, "exchange", len(values), detail, advice=_ADVICE)
        return [float(total) for total in communicator.sum(np.array(values, np.float64), operation, self.timeout)]

    def settle(self, model: paddle.nn.Layer) -> None:
        """Make moving statistics equal that ranks may have each for themselves, before they are used or written."""
        if self.size > 1:
            fw.average_statistics(model, timeout=self.timeout)
