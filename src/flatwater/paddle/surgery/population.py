"""What batch norm layers read while a model runs, pooled over batches, calls and ranks."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import paddle

from flatwater import kernels
from flatwater.errors import DistributedError, InputError, SingleValueError
from flatwater.kernels import Buffer, Statistics
from flatwater.paddle.dtypes import dtype_name
from flatwater.paddle.sync.collectives import Operation, communicator_of
from flatwater.paddle.sync.groups import Sharing, world_ranks
from flatwater.surgery.recalibration import Pool

__all__ = ["Ranks", "Reading", "first_tensor", "moments_of", "reading"]


@dataclass
class Reading:
    """What the layers have read so far.

    Attributes:
        pools: by path; a layer that never ran has none.
        batch: number of the batch that the model is running on, for messages.
    """

    pools: dict[str, Pool]
    batch: int = 0


@contextlib.contextmanager
def reading(layers: Mapping[str, Any]) -> Iterator[Reading]:
    """Pool what ``layers`` read inside. The hooks are gone afterwards.

    Raises:
        InputError: a layer reads something that is not finite, or no tensor of its channels.
        SingleValueError: a layer that normalizes by the batch reads one value per channel.
    """
    found = Reading({})
    with contextlib.ExitStack() as hooks:
        for path, layer in layers.items():

            def hook(layer: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                _read(found, path, layer, first_tensor(inputs, kwargs))

            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield found


def first_tensor(inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> paddle.Tensor | None:
    """What a norm layer normalizes, of the arguments that it was called with."""
    return next((value for value in (*inputs, *kwargs.values()) if isinstance(value, paddle.Tensor)), None)


def _read(found: Reading, path: str, layer: Any, x: paddle.Tensor | None) -> None:
    where = f"batch norm layer {path!r}, in batch {found.batch},"
    count, mean, m2 = moments_of(layer, x, where)
    # Layers that share statistics between ranks ask that of all ranks' values.
    if layer.training and count < 2 and not isinstance(layer, paddle.nn.SyncBatchNorm):
        shape = None if x is None else list(x.shape)
        raise SingleValueError(
            f"{where} reads {'one value' if count else 'no values'} per channel (shape {shape}), which cannot be "
            "normalized; leave that batch out (drop_last=True), or use in_order=True"
        )
    found.pools.setdefault(path, Pool.empty(mean.size)).add(count, mean, m2)


def moments_of(layer: Any, x: paddle.Tensor | None, where: str) -> tuple[int, Statistics, Statistics]:
    """Count, mean and M2 of each channel of what a batch norm reads, in float64.

    Args:
        where: with what the message of an error begins.

    Raises:
        InputError: it is no tensor that the layer takes, or not finite.
    """
    channels = int(layer._mean.shape[0])
    layout = getattr(layer, "_data_layout", None) or layer._data_format
    axis = 1 if layout[1] == "C" else -1
    if x is None or x.ndim < 2 or x.shape[axis] != channels or not kernels.available(dtype_name(x)):
        got = "no tensor" if x is None else f"{dtype_name(x)} of shape {list(x.shape)}"
        raise InputError(f"{where} reads {got}, but takes floats of {channels} channels ({layout}); mend the model")
    count, mean, m2 = _moments(x, axis)
    if not (np.isfinite(mean).all() and np.isfinite(m2).all()):
        channel = int(np.flatnonzero(~(np.isfinite(mean) & np.isfinite(m2)))[0])
        raise InputError(
            f"{where} reads values that are NaN or infinite (channel {channel}); look at that batch of the data, and "
            "at the layers before this one"
        )
    return count, mean, m2


def _moments(x: paddle.Tensor, axis: int) -> tuple[int, Statistics, Statistics]:
    """Count, mean and M2 of each channel, in float64."""
    shape = list(x.shape)
    channels = shape.pop(axis)
    count = prod(shape)
    if not x.place.is_cpu_place():
        return count, *_moments_by_operators(x, axis)
    dense = x.detach().contiguous()
    mean, m2 = np.zeros((2, channels))
    view = (shape[0], channels, prod(shape[1:]))
    kernels.batch_statistics(Buffer(dense.data_ptr(), dtype_name(dense), view, axis == -1), mean, m2)
    return count, mean, m2


def _moments_by_operators(x: paddle.Tensor, axis: int) -> tuple[Statistics, Statistics]:
    """Mean and M2 on a device that the kernels do not run on."""
    wide = x.detach().astype("float64").moveaxis(axis, 0).flatten(1)
    centre = wide.sum(axis=1, keepdim=True) / max(wide.shape[1], 1)
    return centre.flatten().numpy(), ((wide - centre) ** 2).sum(axis=1).numpy()


class Ranks:
    """Who measures together; a world of one where no process group was initialised.

    Args:
        process_group: see :class:`~flatwater.paddle.SyncBatchNorm`.
        layers: what is measured, the same on all ranks.
        timeout: seconds to wait for the others.
        task: what it is for, in messages.
    """

    def __init__(
        self, process_group: Any, layers: Mapping[str, Any], timeout: float, task: str = "recalibrate"
    ) -> None:
        self._task = task
        sharing = Sharing.of(process_group, timeout)
        self._ranks = world_ranks(sharing.ranks)
        self._sizes = {path: int(layer._mean.shape[0]) for path, layer in layers.items()}
        self._timeout = sharing.timeout
        self.alone = len(self._ranks) == 1
        self.first = self.alone or paddle.distributed.get_rank() == self._ranks[0]
        if not self.alone:
            place = next(iter(layers.values()))._mean.place
            self._communicator = communicator_of(self._ranks, sharing.group_id, place)

    @contextlib.contextmanager
    def together(self, purpose: str) -> Iterator[None]:
        """What stands inside succeeds on all ranks, or raises on all of them.

        Raises:
            DistributedError: it failed on another rank.
        """
        try:
            yield
        except DistributedError:
            raise
        except Exception:
            with contextlib.suppress(DistributedError):  # this rank's own error says more
                self.sum(np.ones(1), purpose)
            raise
        failed = int(self.sum(np.zeros(1), purpose)[0])
        if failed:
            raise DistributedError(
                f"{purpose} failed on {failed} of the other ranks of {list(self._ranks)}; see what they say"
            )

    def sum(self, values: Statistics, purpose: str) -> Statistics:
        """The sum over the ranks, the same bits on each.

        Raises:
            DistributedError: a rank died, did not come in time, or came with something else.
        """
        if self.alone:
            return values
        layout = zlib.crc32(repr([*self._sizes.items()]).encode())
        label = f"{self._task}, {purpose} of {len(self._sizes)} layers"
        operation = Operation(label, "average", sum(self._sizes.values()), f"layout {layout:08x}")
        return self._communicator.sum(values, operation, self._timeout)

    def combine(self, pools: Mapping[str, Pool]) -> dict[str, Pool]:
        """The pools of all ranks put together, for each layer that ran on any of them.

        With counts n_r, means m_r and M2_r, two sums give

            n = Σ n_r        mean = Σ n_r·m_r / n        M2 = Σ (M2_r + n_r·(m_r - mean)²)
        """
        if self.alone:
            return dict(pools)
        own = {path: pools.get(path) or Pool.empty(size) for path, size in self._sizes.items()}
        counts = np.array([pool.count for pool in own.values()], np.float64)
        sums = np.concatenate([pool.count * pool.mean for pool in own.values()])
        totals = self.sum(np.concatenate([counts, sums]), "means")
        ends = np.cumsum([*self._sizes.values()])[:-1]
        counts, sums = totals[: len(own)], totals[len(own) :]
        means = [part / max(count, 1.0) for part, count in zip(np.split(sums, ends), counts, strict=True)]
        spread = [
            pool.m2 + pool.count * (pool.mean - mean) ** 2 for pool, mean in zip(own.values(), means, strict=True)
        ]
        m2s = np.split(self.sum(np.concatenate(spread), "variances"), ends)
        return {
            path: Pool(mean, m2, int(count), pool.calls)
            for (path, pool), mean, m2, count in zip(own.items(), means, m2s, counts, strict=True)
            if count
        }
