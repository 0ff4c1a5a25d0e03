"""Moving statistics made equal on all ranks, where plain batch norm was trained by several of them."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import paddle

from flatwater.kernels import Statistics
from flatwater.paddle.kinds import BATCH_NORMS
from flatwater.paddle.running import layers_of, to_numpy
from flatwater.paddle.sync.collectives import Operation, communicator_of
from flatwater.paddle.sync.groups import Sharing, world_ranks
from flatwater.surgery import ChangeReport

__all__ = ["AverageStatistics", "average_statistics"]


def average_statistics(model: paddle.nn.Layer, process_group: Any = None, *, timeout: float = 60.0) -> ChangeReport:
    """Give the batch norms of ``model`` the statistics of all ranks together, the same bits on each.

    Under ``paddle.DataParallel``, plain batch norm leaves each rank with moving statistics of its own; a checkpoint
    then holds those of one rank. With means m_r and variances v_r of n ranks, which count alike, this sets

        mean = 1/n Σ m_r        variance = 1/n Σ (v_r + (m_r - mean)²)

    the mean and variance of the ranks' distributions mixed. Two sums run for the whole model. Alone, a rank does
    nothing. Call it on every rank: before evaluation, before saving, and before ``convert_sync_batchnorm`` of a model
    that was trained without.

    Args:
        process_group: with whom, see :class:`~flatwater.paddle.SyncBatchNorm`.
        timeout: seconds to wait for the other ranks.

    Returns:
        The paths of the layers whose statistics were averaged.

    Raises:
        SurgeryError: ``model`` is not a ``paddle.nn.Layer``.
        InputError: a ``process_group`` or ``timeout`` that is none.
        DistributedError: this process is not in the group; or a rank died, did not come in time, or has other layers.
    """
    norms = {path: layer for path, layer in layers_of(model) if isinstance(layer, BATCH_NORMS)}
    sharing = Sharing.of(process_group, timeout)
    ranks = world_ranks(sharing.ranks)
    if len(ranks) == 1 or not norms:
        return ChangeReport()
    means = [layer._mean for layer in norms.values()]
    variances = [layer._variance for layer in norms.values()]
    sizes = [int(tensor.shape[0]) for tensor in means]
    communicator = communicator_of(ranks, sharing.group_id, means[0].place)
    layout = zlib.crc32(repr([*zip(norms, sizes, strict=True)]).encode())
    operation = Operation(f"{len(norms)} batch norms", "average", sum(sizes), f"layout {layout:08x}")

    own = _joined(means)
    mean = communicator.sum(own, operation, sharing.timeout) / len(ranks)
    spread = _joined(variances) + (own - mean) ** 2
    variance = communicator.sum(spread, operation, sharing.timeout) / len(ranks)
    ends = np.cumsum(sizes)[:-1]
    for tensors, values in ((means, mean), (variances, variance)):
        for tensor, part in zip(tensors, np.split(values, ends), strict=True):
            tensor.set_value(paddle.to_tensor(part, place=tensor.place).astype(tensor.dtype))
    return ChangeReport(changed=list(norms))


def _joined(tensors: list[paddle.Tensor]) -> Statistics:
    return np.concatenate([to_numpy(tensor).astype(np.float64) for tensor in tensors])


class AverageStatistics(paddle.callbacks.Callback):
    """For ``paddle.Model.fit``: :func:`average_statistics` at the end of each epoch and before each evaluation.

    Callbacks run in the order of their list. The checkpoints of ``fit(save_dir=...)`` are written after them all; a
    ``ModelCheckpoint`` of one's own has to stand behind this callback, or it saves what one rank has.

    Args:
        process_group, timeout: as for :func:`average_statistics`.
    """

    def __init__(self, process_group: Any = None, *, timeout: float = 60.0) -> None:
        super().__init__()
        self._process_group = process_group
        self._timeout = timeout

    def on_eval_begin(self, logs: Any = None) -> None:
        self._average()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._average()

    def on_train_end(self, logs: Any = None) -> None:
        self._average()

    def _average(self) -> None:
        average_statistics(self.model.network, self._process_group, timeout=self._timeout)
