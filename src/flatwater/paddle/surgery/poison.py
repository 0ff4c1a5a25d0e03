"""Who reads a tensor, found out by handing rubbish to everybody but those who are known to."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import paddle

from flatwater.paddle.surgery.dataflow import Piece, Seen, find_pieces, hook_first
from flatwater.surgery import Fold

__all__ = ["POISONS", "Poison", "Readings", "poisoned", "read_elsewhere", "readings_of"]

Poison: TypeAlias = Callable[[paddle.Tensor], paddle.Tensor]

Readings: TypeAlias = dict[int, list[Piece] | None]
"""Index of a call of a reader -> what of its input is to be put right; None: all of it."""


def _all_nan(tensor: paddle.Tensor) -> paddle.Tensor:
    return paddle.full_like(tensor, float("nan"))


def _large(tensor: paddle.Tensor) -> paddle.Tensor:
    """Numbers of both signs, for readers that swallow NaN, as a maximum may."""
    signs = np.where(np.arange(int(tensor.size)) % 2, 1e3, -1e3).reshape(tensor.shape)
    return paddle.to_tensor(signs, place=tensor.place).astype(tensor.dtype)


POISONS: tuple[Poison, ...] = (_all_nan, _large)


def readings_of(
    layers: Mapping[str, paddle.nn.Layer], calls: Sequence[Seen], folds: Sequence[Fold], run: Callable[[], Any]
) -> Readings:
    """What the readers of the folds read of the folds' hidden layers.

    Args:
        layers, calls, run: see :func:`flatwater.paddle.surgery.dataflow.trace_calls`.
    """
    hidden_from: dict[str, set[str]] = defaultdict(set)
    for fold in folds:
        for reader in fold.readers:
            hidden_from[reader] |= set(fold.hidden)
    readings: Readings = {}
    for index, call in enumerate(calls):
        if call.same is not None and calls[call.same].path in hidden_from.get(call.path, ()):
            readings[index] = None
    moved = {index for index, call in enumerate(calls) if call.same is None and call.path in hidden_from}
    if moved:
        for index, pieces in find_pieces(layers, calls, moved, run).items():
            hidden = hidden_from[calls[index].path]
            readings[index] = [piece for piece in pieces if calls[piece.writer].path in hidden]
    return readings


@contextlib.contextmanager
def poisoned(
    layers: Mapping[str, paddle.nn.Layer],
    calls: Sequence[Seen],
    folds: Sequence[Fold],
    readings: Readings,
    poison: Poison,
) -> Iterator[None]:
    """Inside, the hidden layers of the folds write rubbish, and only the folds' readers see what they had to write."""
    with _hiding(layers, calls, folds, readings, lambda index, output: poison(output)):
        yield


def read_elsewhere(
    layers: Mapping[str, paddle.nn.Layer],
    calls: Sequence[Seen],
    folds: Sequence[Fold],
    readings: Readings,
    run: Callable[[], list[paddle.Tensor]],
) -> list[Fold]:
    """The folds whose hidden outputs have a gradient, while their readers read constants instead of them.

    Args:
        run: runs the model with gradients.
    """
    leaves: dict[int, paddle.Tensor] = {}
    targets: list[paddle.Tensor] = []

    def watch(index: int, output: paddle.Tensor) -> paddle.Tensor:
        targets.append(output)
        leaves[index] = output.detach()
        leaves[index].stop_gradient = False
        return paddle.assign(leaves[index])  # code that works in place takes no leaf

    with _hiding(layers, calls, folds, readings, watch):
        targets += run()
    targets = [one for one in targets if one.is_floating_point() and not one.stop_gradient]
    if not targets or not leaves:
        return []
    total = paddle.add_n([one.astype("float32").sum() for one in targets])
    gradients = paddle.grad(total, list(leaves.values()), allow_unused=True)
    read = {calls[index].path for index, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    return [fold for fold in folds if read & set(fold.hidden)]


@contextlib.contextmanager
def _hiding(
    layers: Mapping[str, paddle.nn.Layer],
    calls: Sequence[Seen],
    folds: Sequence[Fold],
    readings: Readings,
    replace: Callable[[int, paddle.Tensor], paddle.Tensor],
) -> Iterator[None]:
    """Inside, ``replace`` says what the hidden layers write in each call, which the folds' readers do not see."""
    calls_of: dict[str, list[int]] = defaultdict(list)
    for index, call in enumerate(calls):
        calls_of[call.path].append(index)
    awaited = Counter(
        writer
        for index, pieces in readings.items()
        for writer in ([calls[index].same] if pieces is None else [piece.writer for piece in pieces])
    )
    true: dict[int | None, paddle.Tensor] = {}

    def take(writer: int | None) -> paddle.Tensor:
        awaited[writer] -= 1
        return true[writer] if awaited[writer] else true.pop(writer)

    def hide(path: str) -> Callable[..., paddle.Tensor]:
        coming = iter(calls_of[path])

        def hook(_: paddle.nn.Layer, inputs: tuple[Any, ...], output: paddle.Tensor) -> paddle.Tensor:
            index = next(coming)
            if awaited[index]:
                true[index] = output.detach()
            return replace(index, output)

        return hook

    def reveal(path: str) -> Callable[..., tuple[Any, ...] | None]:
        coming = iter(calls_of[path])

        def hook(_: paddle.nn.Layer, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            index = next(coming)
            if index not in readings:
                return None
            pieces = readings[index]
            known = take(calls[index].same) if pieces is None else _put_right(inputs[0], pieces, take)
            return (known, *inputs[1:])

        return hook

    with contextlib.ExitStack() as hooks:
        for path in {path for fold in folds for path in fold.readers}:
            hooks.callback(layers[path].register_forward_pre_hook(reveal(path)).remove)
        for path in {path for fold in folds for path in fold.hidden}:
            hooks.callback(hook_first(layers[path], hide(path)).remove)
        yield


def _put_right(
    tensor: paddle.Tensor, pieces: Sequence[Piece], take: Callable[[int | None], paddle.Tensor]
) -> paddle.Tensor:
    values = tensor.detach().numpy().copy()
    flat = values.reshape(-1)
    for piece in pieces:
        flat[piece.at] = take(piece.writer).numpy().reshape(-1)[piece.of]
    return paddle.to_tensor(values, place=tensor.place)
