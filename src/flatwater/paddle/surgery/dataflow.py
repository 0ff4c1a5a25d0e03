"""Which layer reads what which layer wrote: the very tensor, or copies of its values wherever they were moved to.

That a tensor is the same is seen at once. That its values were only moved (reshaped, transposed, sliced, split,
joined, shuffled, dropped out in ``eval()``) is found by experiment: every layer writes numbers that occur once in
the whole run, and a layer that reads such a number reads that element. Six runs with other numbers (both signs at
each magnitude, other orders) tell a copy from what only looks like one: an activation, a bound on one side, a median.

What a layer writes is what its own ``forward`` returned: a hook of the user's that puts something else in its place
stands between it and whoever reads that, like any other code.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import paddle

from flatwater.surgery import ELSEWHERE, Source

__all__ = ["Piece", "Seen", "find_copies", "find_pieces", "hook_first", "trace_calls"]

_Integers: TypeAlias = npt.NDArray[np.int64]

# Markers are the floats whose bits are these and the next ones: from 0.5 up to 2^15.
_FIRST_BITS = 0x3F000000
_MOST_MARKERS = 1 << 27
_MARKED = (paddle.float32, paddle.float64)


class Seen(NamedTuple):
    """One run of one layer.

    Attributes:
        path: the layer's.
        reads, writes: shapes of its first argument and of its output; None for what is no tensor.
        same: index of the call that wrote the very tensor it reads; None if there is none.
        more: whether it was given further arguments.
    """

    path: str
    reads: tuple[int, ...] | None
    writes: tuple[int, ...] | None
    same: int | None
    more: bool


class Piece(NamedTuple):
    """Elements of what a call reads that are copies of elements which another call wrote; all as flat positions."""

    writer: int
    at: _Integers
    of: _Integers


def trace_calls(layers: Mapping[str, paddle.nn.Layer], run: Callable[[], Any]) -> list[Seen]:
    """Every call of ``layers`` while ``run`` runs, in order."""
    calls: list[Seen] = []
    # No tensor is kept alive for this; a reference that is dead, or to another tensor of the same id, is no match, nor
    # is a tensor that was changed in place since.
    writers: dict[int, tuple[weakref.ref[Any], int, int]] = {}

    def hook(path: str) -> Callable[..., None]:
        def note(_: paddle.nn.Layer, inputs: tuple[Any, ...], output: Any) -> None:
            reads = inputs[0] if inputs and isinstance(inputs[0], paddle.Tensor) else None
            written = output if isinstance(output, paddle.Tensor) else None
            known = writers.get(id(reads))
            unchanged = known is not None and known[0]() is reads and known[2] == _version(reads)
            same = known[1] if known is not None and unchanged else None
            if written is not None:
                writers[id(written)] = weakref.ref(written), len(calls), _version(written)
            calls.append(Seen(path, _shape(reads), _shape(written), same, any(x is not None for x in inputs[1:])))

        return note

    with contextlib.ExitStack() as hooks:
        for path, layer in layers.items():
            hooks.callback(hook_first(layer, hook(path)).remove)
        run()
    return calls


def hook_first(layer: paddle.nn.Layer, hook: Callable[..., Any]) -> Any:
    """Register a hook that runs right behind ``forward``, before those of the user's; returns what removes it."""
    registered = layer.register_forward_post_hook(hook)
    layer._forward_post_hooks.move_to_end(registered._hook_id, last=False)
    return registered


def find_copies(
    layers: Mapping[str, paddle.nn.Layer],
    calls: Sequence[Seen],
    wanted: Collection[int],
    axis: Callable[[str, int], int],
    run: Callable[[], Any],
) -> dict[int, Source]:
    """Where the channels of what the ``wanted`` calls read were copied from, as far as they were.

    Args:
        layers, calls, run: see :func:`trace_calls`.
        axis: of channels in a tensor of this rank, which the layer at this path reads or writes.
    """
    found: dict[int, _Reading] = {}
    for number, fill in enumerate(_FILLS):
        read = _read_marked(_Markers(fill, calls), layers, wanted if number == 0 else found.keys(), axis, run)
        found = {index: found[index].common(new) if number else new for index, new in read.items()}
    return {index: reading.source for index, reading in found.items() if reading.source.writers()}


def find_pieces(
    layers: Mapping[str, paddle.nn.Layer], calls: Sequence[Seen], wanted: Collection[int], run: Callable[[], Any]
) -> dict[int, list[Piece]]:
    """Element by element what :func:`find_copies` says channel by channel."""
    markers = _Markers(_FILLS[0], calls)
    pieces: dict[int, list[Piece]] = {}

    def look(index: int, tensor: paddle.Tensor) -> None:
        elements = markers.elements(tensor)
        if elements is not None:
            pieces[index] = markers.pieces(elements.reshape(-1))

    return pieces if _run_marked(layers, markers, wanted, look, run) else {}


class _Reading(NamedTuple):
    """Where each channel comes from, and a sum over its elements' positions, by which two runs are compared."""

    source: Source
    sums: npt.NDArray[np.uint64]

    def common(self, other: _Reading) -> _Reading:
        """What two runs agree on."""
        one, two = self.source, other.source
        agreed = (one.calls == two.calls) & (one.channels == two.channels) & (self.sums == other.sums)
        return self._replace(source=Source(np.where(agreed, one.calls, ELSEWHERE), one.channels))


class _Fill(NamedTuple):
    """How markers differ from run to run: their sign, their magnitude as a power of two, their order."""

    sign: float
    exponent: int
    stride: float


_FILLS = tuple(
    _Fill(sign, exponent, stride) for exponent, stride in ((0, 0.38), (20, 0.71), (-20, 0.38)) for sign in (1.0, -1.0)
)


class _Markers:
    """A number of its own for every element that any call writes."""

    def __init__(self, fill: _Fill, calls: Sequence[Seen]) -> None:
        self.fill = fill
        self.calls = calls
        self.sizes = np.array([math.prod(call.writes) if call.writes is not None else 0 for call in calls], np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.total = int(self.sizes.sum())
        self.strides = np.array([_coprime(int(size * fill.stride), int(size)) for size in self.sizes], np.int64)
        self.inverses = np.array(
            [
                pow(int(step), -1, int(size)) if size > 1 else 0
                for step, size in zip(self.strides, self.sizes, strict=True)
            ],
            np.int64,
        )

    def write(self, index: int, like: paddle.Tensor) -> paddle.Tensor:
        """The markers of one call's output."""
        order = np.arange(self.sizes[index]) * self.strides[index] % max(int(self.sizes[index]), 1)
        bits = (_FIRST_BITS + self.starts[index] + order).astype(np.int32)
        values = bits.view(np.float32) * np.float32(self.fill.sign * 2.0**self.fill.exponent)
        return paddle.to_tensor(values.reshape(like.shape), place=like.place).astype(like.dtype)

    def elements(self, tensor: paddle.Tensor) -> _Integers | None:
        """For each element which marker it is, by position among all that are written, or -1; None if none is."""
        array = tensor.detach().numpy()
        if self._decode(array.reshape(-1)[:: array.size // 64 + 1]).max(initial=-1) < 0:
            return None
        return self._decode(array)

    def _decode(self, array: npt.NDArray[Any]) -> _Integers:
        with np.errstate(all="ignore"):
            values = np.asarray(array, np.float32)
            exact = values == array
            values = values * np.float32(self.fill.sign * 2.0**-self.fill.exponent)
        place = np.ascontiguousarray(values).view(np.int32).astype(np.int64) - _FIRST_BITS
        place[~exact | (place < 0) | (place >= self.total)] = -1
        call = self._call_of(place)
        start, size = self.starts[call], np.maximum(self.sizes[call], 1)
        found: _Integers = np.where(place < 0, -1, start + (place - start) * self.inverses[call] % size)
        return found

    def _call_of(self, places: _Integers) -> _Integers:
        # Calls that write nothing share their start with the next; the last of those that share it is the one.
        return np.maximum(np.searchsorted(self.starts, places, "right") - 1, 0)

    def channels(self, elements: _Integers, axis: int, axis_of: Callable[[str, int], int]) -> _Reading:
        """What was read, by channel; ELSEWHERE where the elements of one are not all of one."""
        rows = np.moveaxis(elements, axis, 0).reshape(elements.shape[axis], -1)
        calls = self._call_of(rows)
        inner, count = np.ones(len(self.calls), np.int64), np.ones(len(self.calls), np.int64)
        for index in np.unique(calls):
            shape = self.calls[index].writes or (1,)
            along = axis_of(self.calls[index].path, len(shape))
            inner[index], count[index] = math.prod(shape[along + 1 :]), shape[along]
        channels = (rows - self.starts[calls]) // inner[calls] % count[calls]
        whole = ((rows >= 0) & (calls == calls[:, :1]) & (channels == channels[:, :1])).all(1)
        source = Source(np.where(whole, calls[:, 0], ELSEWHERE).astype(np.intp), channels[:, 0].astype(np.intp))
        weights = np.arange(rows.shape[1], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
        return _Reading(source, (rows.astype(np.uint64) * weights).sum(1, dtype=np.uint64))

    def pieces(self, elements: _Integers) -> list[Piece]:
        at = np.flatnonzero(elements >= 0)
        calls = self._call_of(elements[at])
        return [
            Piece(int(index), at[calls == index], elements[at[calls == index]] - self.starts[index])
            for index in np.unique(calls)
        ]


def _read_marked(
    markers: _Markers,
    layers: Mapping[str, paddle.nn.Layer],
    wanted: Collection[int],
    axis: Callable[[str, int], int],
    run: Callable[[], Any],
) -> dict[int, _Reading]:
    """What each of the ``wanted`` calls reads in one run; nothing if the model does not run like this."""
    read: dict[int, _Reading] = {}

    def look(index: int, tensor: paddle.Tensor) -> None:
        elements = markers.elements(tensor)
        if elements is not None:
            read[index] = markers.channels(elements, axis(markers.calls[index].path, elements.ndim), axis)

    return read if _run_marked(layers, markers, wanted, look, run) else {}


def _run_marked(
    layers: Mapping[str, paddle.nn.Layer],
    markers: _Markers,
    wanted: Collection[int],
    look: Callable[[int, paddle.Tensor], None],
    run: Callable[[], Any],
) -> bool:
    """Whether the model ran as it did before, while every layer wrote markers; ``look`` sees what they read."""
    calls = markers.calls
    if markers.total > _MOST_MARKERS:
        return False
    count = 0

    def hook(path: str) -> Callable[..., paddle.Tensor | None]:
        def mark(_: paddle.nn.Layer, inputs: tuple[Any, ...], output: Any) -> paddle.Tensor | None:
            nonlocal count
            index, count = count, count + 1
            if index >= len(calls) or calls[index].path != path or _shape(output) != calls[index].writes:
                raise _OtherwiseError(path)
            if index in wanted and inputs and isinstance(inputs[0], paddle.Tensor) and inputs[0].dtype in _MARKED:
                look(index, inputs[0])
            if isinstance(output, paddle.Tensor) and output.dtype in _MARKED:
                return markers.write(index, output)
            return None

        return mark

    with contextlib.ExitStack() as hooks:
        for path, layer in layers.items():
            hooks.callback(hook_first(layer, hook(path)).remove)
        try:
            run()
        except MemoryError:
            raise
        except Exception:  # whatever the model's own code raises on such numbers: then it says nothing about them
            return False
    return count == len(calls)


class _OtherwiseError(Exception):
    """The model calls other layers when it computes with other numbers."""


def _coprime(start: int, size: int) -> int:
    """The first number from ``start`` on that has no divisor in common with ``size``."""
    step = max(start, 1)
    while math.gcd(step, size) > 1:
        step += 1
    return step


def _version(tensor: Any) -> int:
    """How often it was changed in place."""
    return int(tensor.inplace_version)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, paddle.Tensor) else None
