"""From checked arguments to one call of the compiled module. Every check stands here."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Set
from functools import cache
from math import prod

import numpy as np
import numpy.typing as npt

from flatwater import host
from flatwater.errors import BackendError, InputError
from flatwater.kernels import _cpu
from flatwater.kernels.buffer import DTYPES, WIDTHS, Buffer, Vector
from flatwater.spec import ACTIVATIONS, SLOPE_IN_OUTPUT, Activation

__all__ = [
    "Call",
    "Statistics",
    "available",
    "check_apart",
    "check_groups",
    "check_slope",
    "check_statistics",
    "check_writable",
    "doubles",
    "isa",
    "prepare",
    "ready",
    "run",
    "set_default_threads",
    "set_threads",
    "threads",
]

Statistics = npt.NDArray[np.float64]

_chosen = False  # whether the program has said by set_threads how many threads compute
_OUTPUTS = frozenset({"y", "dx", "dresidual"})
_ISAS = "avx512", "avx2", "baseline"
_TUNINGS = "intel", "zen4", "other"
_MOST_BYTES = 2**63 - 1  # that an address can be offset by


class Call(_cpu.Call):
    """A call of the compiled module that knows where its arrays lie.

    Attributes:
        places: (begin, end, name) of each, in whatever role.
        filled: the names of the tensors that are written.
    """

    places: list[tuple[int, int, str]]
    filled: frozenset[str]


def available(dtype: str) -> bool:
    """Whether the kernels compute tensors of this dtype."""
    return dtype in DTYPES


@cache
def isa() -> str:
    """The instruction set in use: ``"avx512"``, ``"avx2"`` or ``"baseline"``.

    The best that this processor runs, or the one that the environment variable ``FLATWATER_ISA``
    named when the first kernel was called. How memory is read and written depends on the processor, or on what
    ``FLATWATER_TUNING`` names instead: ``intel``, ``zen4`` or ``other``; results do not.

    Raises:
        BackendError: ``FLATWATER_ISA`` names one that this processor or build lacks, or ``FLATWATER_TUNING`` another
            than these three.
    """
    try:
        return str(_cpu.isa())
    except ValueError as error:
        wrong = []
        tuning, forced = os.environ.get("FLATWATER_TUNING"), os.environ.get("FLATWATER_ISA")
        if tuning not in (None, "", *_TUNINGS):
            wrong.append(f"FLATWATER_TUNING={tuning!r} is no processor: unset it, or use one of {', '.join(_TUNINGS)}")
        if not wrong or forced not in (None, "", *_ISAS):
            wrong.append(
                f"FLATWATER_ISA={forced!r} is not an instruction set of this machine: unset it, "
                f"or use one of {', '.join(_ISAS)}"
            )
        raise BackendError("; ".join(wrong)) from error


@cache
def ready() -> None:
    """What comes before the first call: the instruction set is known, and so is how many threads there may be.

    Raises:
        BackendError: as :func:`isa`.
    """
    isa()
    _limit_threads()


def threads() -> int:
    """How many threads a kernel may use.

    At first what ``OMP_NUM_THREADS`` or ``host.tune()`` says. Without them, as many as OpenMP would take, one for each
    processor, but no more than the control groups let run: a container with a CPU limit stops threads beyond it in the
    midst of a call.
    """
    _limit_threads()
    return int(_cpu.threads())


def set_threads(count: int) -> None:
    """Use ``count`` threads from the next call on. Results are the same bits for any number.

    Raises:
        InputError: ``count`` is not a positive integer.
    """
    try:
        number = 0 if isinstance(count, bool) else operator.index(count)
    except TypeError:
        number = 0
    if number < 1:
        raise InputError(f"{count!r} threads cannot compute anything; give a positive integer")
    global _chosen
    _limit_threads()
    _cpu.set_threads(number)
    _chosen = True


def set_default_threads(count: int) -> None:
    """Use ``count`` threads unless :func:`set_threads` has said how many: as if OpenMP had said so at first."""
    _limit_threads()
    if not _chosen:
        _cpu.set_threads(count)


@cache
def _limit_threads() -> None:
    """Once, before the first question and the first call."""
    own = _cpu.threads()
    # Paddle sets OMP_NUM_THREADS=1 where nobody has set anything, after OpenMP has read it: so what stands there
    # counts if OpenMP agrees.
    if own > 1 and os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip() != str(own):
        _cpu.set_threads(min(own, host.usable_processors()))


def prepare(
    x: Buffer,
    activation: Activation = "none",
    *,
    weight: Vector | None = None,
    bias: Vector | None = None,
    **tensors: Buffer | None,
) -> Call:
    """A call on ``x``, with its other tensors and its parameters checked against it.

    Raises:
        InputError: an unknown dtype or activation, a shape that no tensor has, a tensor or parameter that does not fit
            ``x``, or one to be filled that is read-only.
    """
    ready()
    if x.dtype not in DTYPES:
        raise InputError(f"no kernel for tensors of dtype {x.dtype!r}; use one of {', '.join(DTYPES)}")
    if activation not in ACTIVATIONS:
        raise InputError(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    if len(x.shape) != 3 or min(x.shape) < 0:
        raise InputError(f"a buffer's shape {x.shape} must be (outer, channels, inner), none negative")
    size = prod(x.shape) * WIDTHS[x.dtype]
    if size > _MOST_BYTES or max(x.shape) > _MOST_BYTES:
        raise InputError(f"no memory holds {x.dtype} {x.shape}; give the shape of a tensor that there is")
    call = Call(DTYPES.index(x.dtype), ACTIVATIONS.index(activation), *x.shape, x.channels_last)
    call.x = x.pointer
    call.places = [(x.pointer, x.pointer + size, "x")]
    call.filled = _OUTPUTS - {"y"} if "dy" in tensors else _OUTPUTS  # a backward pass reads y, if it has it
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor[1:4] != x[1:4]:
            raise InputError(
                f"{name} is {_describe(tensor)} but x is {_describe(x)}; they must share dtype, shape and layout"
            )
        if name in call.filled and not tensor.writable:
            raise InputError(f"{name} is read-only, {_describe(tensor)}, but is to be filled; pass memory to write to")
        setattr(call, name, tensor.pointer)
        call.places.append((tensor.pointer, tensor.pointer + size, name))
    if weight is not None:
        call.set_weight(weight.pointer, _is_double(call, weight, "weight", x.shape[1]))
    if bias is not None:
        call.set_bias(bias.pointer, _is_double(call, bias, "bias", x.shape[1]))
    return call


def check_statistics(call: Call, size: int, **arrays: Statistics) -> None:
    """Give the call its arrays of statistics: dense float64, ``size`` values each."""
    for name, array in arrays.items():
        address = doubles(array, size, name)
        setattr(call, name, address)
        call.places.append((address, address + 8 * size, name))


def doubles(array: Statistics, size: int, name: str) -> int:
    """Where the array of ``size`` dense float64 values begins.

    Raises:
        InputError: it is something else.
    """
    address = _cpu.doubles(array, size)
    if address is None:
        raise InputError(
            f"{name} has dtype {array.dtype} and shape {array.shape}; it must be a dense float64 array of ({size},)"
        )
    return address


def check_writable(**vectors: Vector) -> None:
    """Raise InputError unless all of these may be written to."""
    for name, vector in vectors.items():
        if not vector.writable:
            raise InputError(f"{name} is read-only, {vector.size} {vector.dtype} values; pass memory to write to")


def check_groups(x: Buffer, groups: int) -> None:
    """Raise InputError unless the channels of ``x`` divide into ``groups``."""
    if groups < 1 or x.shape[1] % groups:
        raise InputError(f"groups={groups} does not divide the {x.shape[1]} channels; choose a divisor")


def check_slope(activation: Activation, y: Buffer | None) -> None:
    """Raise InputError if a backward pass is given ``y`` and the activation's slope does not follow from it."""
    if y is not None and activation not in SLOPE_IN_OUTPUT:
        raise InputError(f"the slope of {activation!r} does not follow from y; give the residual instead")


def run(kernel: Callable[[_cpu.Call], None], call: Call, x: Buffer, **filled: Statistics) -> None:
    """Run the kernel, which fills these arrays; over no elements sums are 0, and inv_std is that of the variance 0.

    Raises:
        InputError: an array that is to be filled is read-only, or what is to be filled shares memory with something.
    """
    for name, array in filled.items():
        if not array.flags.writeable:
            raise InputError(f"{name} is a read-only array of {array.size} values, but is to be filled; pass a copy")
    check_apart(call.places, call.filled | filled.keys())
    if 0 not in x.shape:
        kernel(call)
        return
    for name, array in filled.items():
        if name != "inv_std":
            array.fill(0.0)
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            array.fill(1 / np.sqrt(np.float64(call.epsilon)))


def check_apart(places: Iterable[tuple[int, int, str]], written: Set[str]) -> None:
    """Raise InputError where something that is written lies where something else does.

    Args:
        places: (begin, end, name) of each, as in :class:`Call`.
        written: the names of those that are.
    """
    all_end = written_end = 0  # of those that begin earlier, where the one that ends last ends; and its name
    all_last = written_last = ""
    for begin, end, name in sorted(places):
        if begin == end:
            continue
        if begin < (all_end if name in written else written_end):
            other = all_last if name in written else written_last
            raise InputError(
                f"{other} and {name} share memory, from address {begin} on; what a kernel fills must lie apart from "
                "all else that it is given: pass memory of its own"
            )
        if end > all_end:
            all_end, all_last = end, name
        if end > written_end and name in written:
            written_end, written_last = end, name


def _is_double(call: Call, vector: Vector, name: str, channels: int) -> bool:
    if vector.size != channels:
        raise InputError(f"{name} has {vector.size} values but x has {channels} channels; give one per channel")
    if vector.dtype not in ("float32", "float64"):
        raise InputError(f"{name} has dtype {vector.dtype!r}; parameters are float32 or float64")
    call.places.append((vector.pointer, vector.pointer + channels * WIDTHS[vector.dtype], name))
    return vector.dtype == "float64"


def _describe(buffer: Buffer) -> str:
    return f"{buffer.dtype} {buffer.shape}{' channels-last' if buffer.channels_last else ''}"
