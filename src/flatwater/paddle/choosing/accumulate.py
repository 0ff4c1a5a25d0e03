"""``accumulate_statistics``: moving statistics that take several small batches for one."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import paddle

from flatwater.errors import InputError, StatisticsError, SurgeryError
from flatwater.kernels import Statistics
from flatwater.paddle.backend import is_replay
from flatwater.paddle.captured import captured_norm
from flatwater.paddle.choosing.schedule import matching_batch_norms
from flatwater.paddle.kinds import normalizes_by_batch
from flatwater.paddle.running import to_numpy
from flatwater.paddle.surgery.population import Ranks, first_tensor, moments_of
from flatwater.surgery.recalibration import Pool

__all__ = ["AccumulateStatistics", "AccumulatedStatistics", "accumulate_statistics"]

_Moments: TypeAlias = tuple[int, Statistics, Statistics]

# Layers that are accumulating now: a second accumulation would take what the first holds back for theirs.
_accumulating: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass
class AccumulatedStatistics:
    """What the batch norms have read in an :func:`accumulate_statistics` block.

    Attributes:
        counts: values per channel behind the statistics, by path; of this rank in the block, and behind it of all
            ranks that share them. A layer that has read nothing is not in it.
    """

    counts: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def accumulate_statistics(
    model: paddle.nn.Layer, *, pattern: str | Sequence[str] | None = None
) -> Iterator[AccumulatedStatistics]:
    """Inside, the moving statistics of batch norms wait; behind it, all that was read counts as one batch.

        for micro_batches in steps:
            with fw.accumulate_statistics(model):
                for x, target in micro_batches:
                    (loss(model(x), target) / len(micro_batches)).backward()
            optimizer.step()

    At the end of the block each layer takes one step, with its momentum of then (the share of the OLD kept):

        moving = momentum · moving + (1 - momentum) · pooled
        pooled mean = 1/n Σ x        pooled variance = 1/n Σ (x - pooled mean)²

    over all n values per channel that it read in the block, in float64: those of the concatenated batch, whatever the
    sizes of its parts, and not averages of averages. The variance is the biased one, as Paddle's on the CPU.

    **Each small batch is still normalized by its own mean and variance**: nothing that is computed inside, no output
    and no gradient, is other than without. What gets better is ``eval()``. To normalize by more samples takes another
    norm, or several devices (see :func:`~flatwater.paddle.advise`).

    A block is one step, from its beginning to its end. After an exception in it the statistics are, bit for bit, what
    they were before. ``eval()`` inside normalizes by the statistics from before, and adds nothing. Frozen layers stay
    out of it, and so does what ``recompute`` does again, as long as ``backward()`` is inside too. All layers are
    treated alike: Paddle's, subclasses of them, ours. Layers of SyncBatchNorm pool over all ranks that share
    statistics, with two sums for all layers together: every rank has to come to the end of the block. Plain ones keep
    to their own rank, as always.

    It costs one more reading of what each layer reads. Hooks exist inside the block only.

    Args:
        pattern: a glob, or several, one of which a layer's path must match (``"backbone.*"``); None for all.

    Raises:
        InputError: a layer reads values that are NaN or infinite.
        StatisticsError: statistics that are too large for the layer's dtype; all of them are what they were.
        SurgeryError: no batch norm matches, one is in such a block already, or was captured by ``to_static``, where
            hooks are not called.
        DistributedError: another rank did not come to the end of the block.
    """
    block = _Block(model, pattern)
    try:
        yield block.seen
        block.finish()
    except BaseException:
        block.abandon()
        raise


class _Group(NamedTuple):
    """With whom a layer shares statistics, as :class:`Ranks` takes it."""

    ranks: tuple[int, ...] | None
    id: int | None


class _Block:
    """One step, which begins here and ends with :meth:`finish` or :meth:`abandon`."""

    def __init__(self, model: paddle.nn.Layer, pattern: str | Sequence[str] | None) -> None:
        self.seen = AccumulatedStatistics()
        self._layers = matching_batch_norms(model, pattern)
        captured = captured_norm(model, self._layers)
        if captured is not None:
            raise SurgeryError(
                f"batch norm {captured!r} was captured by to_static, where nobody can see what it reads; call "
                "forward.rollback() on what was captured"
            )
        busy = next((path for path, layer in self._layers.items() if layer in _accumulating), None)
        if busy is not None:
            raise SurgeryError(f"batch norm {busy!r} accumulates statistics already; end that block first")
        self._before = {
            path: (layer._mean, layer._mean.clone(), layer._variance, layer._variance.clone())
            for path, layer in self._layers.items()
        }
        self._pools: dict[str, Pool] = {}
        self._held: dict[str, float] = {}  # the momentum of layers that run at the moment
        self._pending: dict[str, _Moments] = {}
        self._hooks = contextlib.ExitStack()
        self._look()

    def finish(self) -> None:
        """Let the moving statistics of all layers take their step, or those of none."""
        self._stop()
        self._write(self._pooled())

    def abandon(self) -> None:
        """Make all statistics what they were."""
        self._stop()
        for mean, old_mean, variance, old_variance in self._before.values():
            for tensor, old in ((mean, old_mean), (variance, old_variance)):
                if to_numpy(tensor).tobytes() != to_numpy(old).tobytes():
                    tensor.set_value(old)

    def _stop(self) -> None:
        self._hooks.close()
        for path in list(self._held):  # of layers whose call failed
            self._release(path)

    def _look(self) -> None:
        for path, layer in self._layers.items():

            def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                self._begin(path, layer, args, kwargs)

            def after(layer: Any, args: tuple[Any, ...], output: Any, path: str = path) -> None:
                self._end(path)

            _accumulating.add(layer)
            self._hooks.callback(_accumulating.discard, layer)
            self._hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._hooks.callback(layer.register_forward_post_hook(after).remove)

    def _begin(self, path: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pending.pop(path, None)
        if not normalizes_by_batch(layer, training=layer.training):
            return
        if not is_replay():
            where = f"batch norm layer {path!r}, in accumulate_statistics,"
            self._pending[path] = moments_of(layer, first_tensor(args, kwargs), where)
        # With momentum 1 all of the old is kept. For the time of the call only: whoever sets or reads it in between
        # finds the layer's own. After a call that failed it is held already.
        self._held.setdefault(path, layer._momentum)
        layer._momentum = 1.0

    def _end(self, path: str) -> None:
        self._release(path)
        moments = self._pending.pop(path, None)
        if moments is not None and moments[0]:
            pool = self._pools.setdefault(path, Pool.empty(moments[1].size))
            pool.add(*moments)
            self.seen.counts[path] = pool.count

    def _release(self, path: str) -> None:
        if path in self._held:
            self._layers[path]._momentum = self._held.pop(path)

    def _pooled(self) -> dict[str, Pool]:
        """What was read, on all ranks that share it, by the layers that are not frozen by now."""
        moving = {path: layer for path, layer in self._layers.items() if normalizes_by_batch(layer, training=True)}
        pools = {path: pool for path, pool in self._pools.items() if path in moving and not _shares(moving[path])}
        groups: dict[_Group, dict[str, Any]] = {}
        for path, layer in moving.items():
            if _shares(layer):
                group = _Group(getattr(layer, "_shared_ranks", None), getattr(layer, "_group_id", None))
                groups.setdefault(group, {})[path] = layer
        for group, layers in groups.items():
            timeout = max(float(getattr(layer, "_timeout", 60.0)) for layer in layers.values())
            ranks = Ranks(group, layers, timeout, "accumulate_statistics")
            pools |= ranks.combine({path: self._pools[path] for path in layers if path in self._pools})
        self.seen.counts = {path: pools[path].count for path in self._layers if path in pools}
        return pools

    def _write(self, pools: Mapping[str, Pool]) -> None:
        steps = []
        for path, pool in pools.items():
            if pool.count < 2:  # no variance exists: in a layer that takes such a batch, it moves nothing either
                continue
            mean, old_mean, variance, old_variance = self._before[path]
            kept = float(self._layers[path]._momentum)
            for tensor, old, batch in ((mean, old_mean, pool.mean), (variance, old_variance, pool.variance)):
                moving = kept * to_numpy(old).astype(np.float64) + (1.0 - kept) * batch
                new = paddle.to_tensor(moving, place=tensor.place).astype(tensor.dtype)
                if not bool(paddle.isfinite(new).all()):
                    raise StatisticsError(
                        f"the moving statistics of batch norm layer {path!r} would be NaN or too large for "
                        f"{tensor.dtype} (largest variance {pool.variance.max():.3g}); look at the layers before it"
                    )
                steps.append((tensor, new))
        for tensor, new in steps:
            tensor.set_value(new)


def _shares(layer: Any) -> bool:
    return isinstance(layer, paddle.nn.SyncBatchNorm)


class AccumulateStatistics(paddle.callbacks.Callback):
    """:func:`accumulate_statistics` for ``paddle.Model.fit(accumulate_grad_batches=every)``.

    What is left at the end of an epoch counts as a step too, as it does for the gradients. What an exception in
    ``fit()`` left unfinished is dropped when the next one begins.

    Args:
        every: how many batches count as one.
        pattern: as for :func:`accumulate_statistics`.

    Raises:
        InputError: ``every`` is below 1.
    """

    def __init__(self, every: int, *, pattern: str | Sequence[str] | None = None) -> None:
        super().__init__()
        if every < 1:
            raise InputError(f"every={every} must be at least 1: the accumulate_grad_batches of fit()")
        self._every = every
        self._pattern = pattern
        self._block: _Block | None = None
        self._batches = 0

    def on_train_begin(self, logs: Any = None) -> None:
        if self._block is not None:
            self._block.abandon()
        self._block = None

    def on_train_batch_begin(self, step: int, logs: Any = None) -> None:
        if self._block is None:
            self._block, self._batches = _Block(self.model.network, self._pattern), 0

    def on_train_batch_end(self, step: int, logs: Any = None) -> None:
        self._batches += 1
        if self._batches == self._every:
            self._finish()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._finish()

    def _finish(self) -> None:
        block, self._block = self._block, None
        if block is None:
            return
        try:
            block.finish()
        except BaseException:
            block.abandon()
            raise
