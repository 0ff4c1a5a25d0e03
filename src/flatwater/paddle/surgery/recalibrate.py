"""``recalibrate``: the statistics of batch norms computed anew, exactly, from data (precise batch norm)."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import paddle
import rich.progress
from rich.console import Console

from flatwater.errors import FlatwaterError, InputError, SingleValueError, StatisticsError, SurgeryError
from flatwater.paddle.kinds import BATCH_NORMS, normalizes_by_batch
from flatwater.paddle.running import SyncBatchNormOnCPU, as_inputs, called, to_numpy, undisturbed
from flatwater.paddle.select import select
from flatwater.paddle.surgery.influence import closure, influences, stages
from flatwater.paddle.surgery.population import Ranks, reading
from flatwater.paddle.sync.layer import SyncBatchNorm
from flatwater.surgery.recalibration import Pool, RecalibrationReport, layer_change
from flatwater.verify import one_line

__all__ = ["recalibrate"]


def recalibrate(
    model: paddle.nn.Layer,
    loader: Iterable[Any],
    *,
    forward: Callable[[paddle.nn.Layer, Any], object] | None = None,
    batches: int | None = None,
    in_order: bool = False,
    pattern: str | Sequence[str] | None = None,
    unreached: Literal["error", "keep"] = "error",
    process_group: Any = None,
    timeout: float = 1800.0,
    progress: bool = True,
) -> RecalibrationReport:
    """Replace the moving statistics of the batch norms of ``model`` by those of the data in ``loader``, in place.

        mean = 1/n Σ x        variance = 1/n Σ (x - mean)²

    per channel, over all n values that the layer reads in all batches, calls and ranks together: pooled in float64,
    not an average of batches' averages, so that batches may be unequal. The variance is the biased one, which
    ``eval()`` divides by, and which Paddle's moving variance follows on the CPU. Momentum plays no part.

    What a layer reads depends on how the layers before it normalize. By default all recalibrated layers normalize by
    the batch, as in training, in one pass over the loader: "precise BN" of Wu & Johnson 2021, "Rethinking 'Batch' in
    BatchNorm", arXiv:2105.07576. With ``in_order`` a layer is measured when all that it depends on normalizes by its
    new statistics: then the statistics are those of what it will read in ``eval()``, whatever the batch size. In
    both, everything else runs as in ``eval()``: dropout is off, and other norms keep their statistics.

    ``in_order`` reads the loader once for each stage, in which independent layers (those of parallel branches)
    are measured together: ``report.passes`` says how often, for a chain as often as it has batch norms. Before, it
    runs the first batch once for each layer, and two times more, to find out what depends on what. A layer that
    reads what it wrote itself (in a recurrent network) normalizes by the batch while it is measured.

    Parameters, modes, hooks and random number streams are afterwards what they were. Statistics are written at the
    end: after an error or an interrupt all of them are, bit for bit, what they were.

    Args:
        loader: batches, each a tensor or array, a list or tuple of them (arguments of the model in order), or a
            dict (arguments by name). Ranks may bring different numbers of batches, except where a SyncBatchNorm
            normalizes by the global batch. ``in_order`` needs the same batches each time that it is iterated; the
            random number streams of Paddle, NumPy and Python start each pass at the same place.
        forward: how to run the model on a batch, where it does not take all of it:
            ``lambda model, batch: model(batch[0])``.
        batches: read only so many; None for all.
        in_order: see above.
        pattern: a glob, or several, one of which a layer's path must match (``"backbone.*"``); None for every layer.
        unreached: what to do about a layer that no batch reaches: raise, or keep its statistics.
        process_group: with whom to pool, see :class:`~flatwater.paddle.SyncBatchNorm`; None for all ranks. All of
            them have to call this, and get the same bits.
        timeout: seconds to wait for the other ranks, which read their data meanwhile.
        progress: show a bar on standard error, if that is a terminal.

    Returns:
        How much each layer's statistics moved, which layers were left and why, and the way back.

    Raises:
        InputError: a bad argument, no batches, or values that are not finite; the message names layer and batch.
        SingleValueError: one value per channel in a batch, or in all of them together.
        StatisticsError: statistics too large for the layer's dtype.
        SurgeryError: no batch norm matches, all are frozen, one was not reached, or the model fails on a batch.
        DistributedError: another rank failed, died, did not come in time or has other layers.
    """
    if batches is not None and (isinstance(batches, bool) or not hasattr(batches, "__index__") or batches < 1):
        raise InputError(f"batches={batches!r} must be a positive number, or None for all")
    limit = None if batches is None else operator.index(batches)
    if unreached not in ("error", "keep"):
        raise InputError(f"unreached={unreached!r} must be 'error' or 'keep'")
    if in_order and isinstance(loader, Iterator):
        raise InputError(
            f"in_order reads the loader several times, but a {type(loader).__name__} can be read once; give a "
            "DataLoader or a list"
        )
    layers, left = _choose(model, pattern)
    ranks = Ranks(process_group, layers, timeout)
    with undisturbed(model) as rewind, _bar(shown=progress and ranks.first) as bar:
        measurement = _Measurement(model, loader, forward or _call, limit, layers, ranks, rewind, bar)
        pools = measurement.in_order() if in_order else measurement.by_batch()
    missing = [path for path in layers if path not in pools]
    if missing and unreached == "error":
        raise SurgeryError(
            f"no batch reached {', '.join(map(repr, missing))} in {type(model).__name__}; leave them out by pattern=, "
            "or with unreached='keep', or feed what reaches them (a forward captured by to_static hides its layers)"
        )
    left |= dict.fromkeys(missing, "no batch reached it")
    changes = [
        layer_change(path, pool, _values(layers[path]._mean), _values(layers[path]._variance), layers[path]._epsilon)
        for path, pool in pools.items()
    ]
    undo = _write({path: (layers[path], pool) for path, pool in pools.items()})
    return RecalibrationReport(changes, left, measurement.passes, measurement.count or 0, undo)


@dataclass
class _Measurement:
    """Passes over the loader, inside :func:`undisturbed`.

    Attributes:
        layers: to be recalibrated, by path.
        rewind: puts the random number streams back to where they were.
        passes: how many there were.
        count: batches in each of them.
    """

    model: paddle.nn.Layer
    loader: Iterable[Any]
    forward: Callable[[paddle.nn.Layer, Any], object]
    limit: int | None
    layers: dict[str, Any]
    ranks: Ranks
    rewind: Callable[[], None]
    bar: rich.progress.Progress
    passes: int = 0
    count: int | None = None

    def by_batch(self) -> dict[str, Pool]:
        """All layers in one pass, each of them normalizing by the batch."""
        return self._measure(list(self.layers), list(self.layers), of=1)

    def in_order(self) -> dict[str, Pool]:
        """Layers in a later pass than those that they depend on."""
        paths = list(self.layers)
        with self.ranks.together("finding the order of layers"):
            reached = self._influences()
        reached = closure(self.ranks.sum(reached.astype(np.float64).reshape(-1), "order").reshape(reached.shape) > 0)
        found: dict[str, Pool] = {}
        groups = stages(reached)
        for group in groups:
            looped = [paths[index] for index in group if reached[index, index]]
            pools = self._measure([paths[index] for index in group], looped, of=len(groups))
            for path, pool in pools.items():
                _set(self.layers[path], pool)
            found |= pools
        return {path: found[path] for path in paths if path in found}

    def _influences(self) -> Any:
        first = next(self._batches(), None)
        if first is None:
            return np.zeros((len(self.layers), len(self.layers)), np.bool_)

        def run() -> None:
            self.rewind()
            self.forward(self.model, first)

        try:
            return influences(self.layers, run)
        except FlatwaterError:
            raise
        except Exception as error:  # the model's own code may raise anything
            raise self._failure(0, error) from error

    def _measure(self, paths: list[str], by_batch: list[str], *, of: int) -> dict[str, Pool]:
        """Pool what the layers read in one pass of ``of``, on all ranks."""
        self.passes += 1
        layers = {path: self.layers[path] for path in paths}
        purpose = f"pass {self.passes} of {of}"
        task = self.bar.add_task(purpose, total=self._length())
        with self.ranks.together(purpose):
            count = 0
            with reading(layers) as found, _normalizing_by_batch([self.layers[path] for path in by_batch]):
                for batch in self._batches():
                    found.batch = count
                    try:
                        self.forward(self.model, batch)
                    except FlatwaterError:
                        raise
                    except Exception as error:  # the model's own code may raise anything
                        raise self._failure(count, error) from error
                    count += 1
                    self.bar.advance(task)
            if self.count not in (None, count):
                raise InputError(
                    f"the loader gave {self.count} batches in the first pass and {count} in pass {self.passes}; "
                    "in_order needs one that gives the same each time"
                )
            self.count = count
        if not int(self.ranks.sum(np.array([float(count)]), "batches")[0]):
            raise InputError("the loader gave no batches; give it data to compute statistics of")
        pools = self.ranks.combine(found.pools)
        for path, pool in pools.items():
            if pool.count < 2:
                raise SingleValueError(
                    f"batch norm layer {path!r} reads {pool.count} value per channel in all batches together, of which "
                    "no variance exists; give more data"
                )
        return pools

    def _batches(self) -> Iterator[Any]:
        self.rewind()
        return itertools.islice(iter(self.loader), self.limit)

    def _length(self) -> int | None:
        try:
            length = len(self.loader)  # type: ignore[arg-type]
        except (TypeError, ValueError):  # the latter is what Paddle's DataLoader of a stream raises
            return self.limit
        return length if self.limit is None else min(length, self.limit)

    def _failure(self, batch: int, error: Exception) -> SurgeryError:
        return SurgeryError(
            f"{type(self.model).__name__} fails on batch {batch} of the loader: {one_line(error)}; give "
            "forward=lambda model, batch: model(...) if it does not take the whole batch"
        )


def _call(model: paddle.nn.Layer, batch: Any) -> object:
    try:
        inputs = as_inputs(batch, nested=True)
    except InputError as error:
        raise InputError(
            f"a batch of the loader is no input of a model: {error}. Give forward=lambda model, batch: model(...) to "
            "say what of it is"
        ) from error
    return called(model, inputs)  # which may work in place, and be called again


def _choose(model: paddle.nn.Layer, pattern: str | Sequence[str] | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The batch norms to recalibrate, and why others that match are left."""
    matching = select(model, lambda layer: isinstance(layer, BATCH_NORMS), pattern, "batch norm layer")
    chosen = {path: layer for path, layer in matching.items() if normalizes_by_batch(layer, training=True)}
    if not chosen:
        raise SurgeryError(f"all batch norm layers are frozen, among them {next(iter(matching))!r}; thaw them first")
    return chosen, {path: "its statistics are frozen" for path in matching if path not in chosen}


@contextlib.contextmanager
def _normalizing_by_batch(layers: list[Any]) -> Iterator[None]:
    """Layers in ``train()``; Paddle's SyncBatchNorm, which the CPU cannot run in it, as ours."""
    synchronised = [layer for layer in layers if isinstance(layer, SyncBatchNormOnCPU)]
    try:
        for layer in synchronised:
            layer.__class__ = SyncBatchNorm
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False
        for layer in synchronised:
            layer.__class__ = SyncBatchNormOnCPU
            layer.__dict__.pop("_accepted", None)  # what it looked up while it was ours


def _bar(*, shown: bool) -> rich.progress.Progress:
    console = Console(stderr=True)
    return rich.progress.Progress(
        rich.progress.TextColumn("recalibrate, {task.description}"),
        rich.progress.MofNCompleteColumn(),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
    )


def _values(tensor: paddle.Tensor) -> Any:
    return to_numpy(tensor).astype(np.float64)


def _set(layer: Any, pool: Pool) -> None:
    for tensor, values in ((layer._mean, pool.mean), (layer._variance, pool.variance)):
        tensor.set_value(paddle.to_tensor(values, place=tensor.place).astype(tensor.dtype))


def _write(population: Mapping[str, tuple[Any, Pool]]) -> list[Callable[[], None]]:
    """Write all statistics, or none; returns the ways back."""
    undo: list[Callable[[], None]] = []
    try:
        for path, (layer, pool) in population.items():
            undo += [partial(tensor.set_value, tensor.clone()) for tensor in (layer._mean, layer._variance)]
            _set(layer, pool)
            if not (np.isfinite(_values(layer._mean)).all() and np.isfinite(_values(layer._variance)).all()):
                raise StatisticsError(
                    f"the statistics of batch norm layer {path!r} are too large for {layer._mean.dtype} (largest "
                    f"variance {pool.variance.max():.3g}); scale the data, or look at the layers before it"
                )
    except BaseException:
        for restore in undo:
            restore()
        raise
    return undo
