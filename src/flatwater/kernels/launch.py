"""From checked arguments to one call of the compiled module. Every check stands here."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from flatwater.errors import BackendError, InputError
from flatwater.kernels import _cpu
from flatwater.kernels.buffer import DTYPES, Buffer, Vector
from flatwater.spec import ACTIVATIONS, SLOPE_IN_OUTPUT, Activation

__all__ = [
    "Statistics",
    "available",
    "check_groups",
    "check_slope",
    "check_statistics",
    "doubles",
    "isa",
    "prepare",
    "run",
    "set_threads",
    "threads",
]

Statistics = npt.NDArray[np.float64]


def available(dtype: str) -> bool:
    """Whether the kernels compute tensors of this dtype."""
    return dtype in DTYPES


@cache
def isa() -> str:
    """The instruction set in use: ``"avx512"``, ``"avx2"`` or ``"baseline"``.

    The best that this processor runs, or the one that the environment variable ``FLATWATER_ISA``
    named when the first kernel was called.

    Raises:
        BackendError: ``FLATWATER_ISA`` names one that this processor or build lacks.
    """
    try:
        return str(_cpu.isa())
    except ValueError as error:
        forced = os.environ.get("FLATWATER_ISA")
        raise BackendError(
            f"FLATWATER_ISA={forced!r} is not an instruction set of this machine; unset it, "
            "or use avx512, avx2 or baseline"
        ) from error


def threads() -> int:
    """How many threads a kernel may use: at first what OpenMP says (``OMP_NUM_THREADS``)."""
    return int(_cpu.threads())


def set_threads(count: int) -> None:
    """Use ``count`` threads from the next call on. Results are the same bits for any number.

    Raises:
        InputError: ``count`` is not a positive integer.
    """
    if not isinstance(count, int) or count < 1:
        raise InputError(f"{count!r} threads cannot compute anything; give a positive integer")
    _cpu.set_threads(count)


def prepare(
    x: Buffer,
    activation: Activation = "none",
    *,
    weight: Vector | None = None,
    bias: Vector | None = None,
    **tensors: Buffer | None,
) -> _cpu.Call:
    """A call on ``x``, with its other tensors and its parameters checked against it.

    Raises:
        InputError: an unknown dtype or activation, or a tensor or parameter that does not fit ``x``.
    """
    isa()
    if x.dtype not in DTYPES:
        raise InputError(f"no kernel for tensors of dtype {x.dtype!r}; use one of {', '.join(DTYPES)}")
    if activation not in ACTIVATIONS:
        raise InputError(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    if min(x.shape) < 0 or len(x.shape) != 3:
        raise InputError(f"a buffer's shape {x.shape} must be (outer, channels, inner), none negative")
    call = _cpu.Call(DTYPES.index(x.dtype), ACTIVATIONS.index(activation), *x.shape, x.channels_last)
    call.x = x.pointer
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor[1:] != x[1:]:
            raise InputError(
                f"{name} is {_describe(tensor)} but x is {_describe(x)}; they must share dtype, shape and layout"
            )
        setattr(call, name, tensor.pointer)
    if weight is not None:
        call.set_weight(weight.pointer, _is_double(weight, "weight", x.shape[1]))
    if bias is not None:
        call.set_bias(bias.pointer, _is_double(bias, "bias", x.shape[1]))
    return call


def check_statistics(call: _cpu.Call, size: int, **arrays: Statistics) -> None:
    """Give the call its arrays of statistics: dense float64, ``size`` values each."""
    for name, array in arrays.items():
        setattr(call, name, doubles(array, size, name))


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


def check_groups(x: Buffer, groups: int) -> None:
    """Raise InputError unless the channels of ``x`` divide into ``groups``."""
    if groups < 1 or x.shape[1] % groups:
        raise InputError(f"groups={groups} does not divide the {x.shape[1]} channels; choose a divisor")


def check_slope(activation: Activation, y: Buffer | None) -> None:
    """Raise InputError if a backward pass is given ``y`` and the activation's slope does not follow from it."""
    if y is not None and activation not in SLOPE_IN_OUTPUT:
        raise InputError(f"the slope of {activation!r} does not follow from y; give the residual instead")


def run(kernel: Callable[[_cpu.Call], None], call: _cpu.Call, x: Buffer, **filled: Statistics) -> None:
    """Run the kernel, which fills these arrays; over no elements, all that it fills is a sum of 0.

    Raises:
        InputError: an array that is to be filled is read-only.
    """
    for name, array in filled.items():
        if not array.flags.writeable:
            raise InputError(f"{name} is a read-only array of {array.size} values, but is to be filled; pass a copy")
    if 0 not in x.shape:
        kernel(call)
        return
    for array in filled.values():
        array.fill(0.0)


def _is_double(vector: Vector, name: str, channels: int) -> bool:
    if vector.size != channels:
        raise InputError(f"{name} has {vector.size} values but x has {channels} channels; give one per channel")
    if vector.dtype not in ("float32", "float64"):
        raise InputError(f"{name} has dtype {vector.dtype!r}; parameters are float32 or float64")
    return vector.dtype == "float64"


def _describe(buffer: Buffer) -> str:
    return f"{buffer.dtype} {buffer.shape}{' channels-last' if buffer.channels_last else ''}"
