"""Memory that somebody else owns, as the kernels see it."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flatwater.errors import InputError

__all__ = ["DTYPES", "WIDTHS", "Buffer", "Vector", "address"]

DTYPES = ("float32", "float64", "bfloat16", "float16")
"""The element types that the kernels know, in the order of the C++ enumeration."""

WIDTHS = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
"""How many bytes one element takes."""


class Buffer(NamedTuple):
    """A tensor: where it lies, and how it is read.

    Attributes:
        pointer: the address of the first element. The caller keeps the memory alive.
        dtype: one of :data:`DTYPES`.
        shape: ``(outer, channels, inner)``: samples, channels, and the product of the spatial
            dimensions (1 if there are none).
        channels_last: whether memory holds ``(outer, inner, channels)``. Either way it is dense.
        writable: whether a kernel may fill it.
    """

    pointer: int
    dtype: str
    shape: tuple[int, int, int]
    channels_last: bool = False
    writable: bool = True

    @classmethod
    def from_numpy(cls, array: npt.NDArray[Any], *, channels_last: bool = False, dtype: str | None = None) -> Buffer:
        """The buffer of a dense array of shape ``(N, C, ...)``, or ``(N, ..., C)`` with ``channels_last``.

        Args:
            array: the memory; it must outlive the buffer. What NumPy holds to be read-only, no kernel fills.
            channels_last: where the channels stand.
            dtype: ``"bfloat16"`` says that a uint16 array holds bfloat16 values.

        Raises:
            InputError: fewer than two dimensions, memory that is not dense or not aligned to its elements, or another
                ``dtype`` than the array's.
        """
        if array.ndim < 2:
            raise InputError(f"an array of shape {array.shape} has no channels; give at least two dimensions (N, C)")
        if not array.flags.c_contiguous:
            raise InputError(f"an array of strides {array.strides} is not dense; use numpy.ascontiguousarray")
        if not array.flags.aligned:
            raise InputError(f"a {array.dtype} array at address {address(array)} begins inside an element; pass a copy")
        stored = "uint16" if dtype == "bfloat16" else dtype or str(array.dtype)
        if str(array.dtype) not in (stored, "bfloat16"):
            raise InputError(f"a {array.dtype} array does not hold {dtype} values; only uint16 stands for bfloat16")
        outer, *rest = array.shape
        channels = rest.pop() if channels_last else rest.pop(0)
        shape = (outer, channels, prod(rest))
        return cls(address(array), dtype or str(array.dtype), shape, channels_last, array.flags.writeable)


class Vector(NamedTuple):
    """One number per channel: γ, β, a running statistic. ``dtype`` is float32 or float64.

    ``writable`` says whether it may be moved on, or stored to.
    """

    pointer: int
    dtype: str
    size: int
    writable: bool = True

    @classmethod
    def from_numpy(cls, array: npt.NDArray[Any]) -> Vector:
        """The vector of a dense, one-dimensional float32 or float64 array, which must outlive it."""
        if array.ndim != 1 or not array.flags.c_contiguous or array.dtype not in (np.float32, np.float64):
            raise InputError(
                f"an array of shape {array.shape} and dtype {array.dtype} is not a vector of parameters; "
                "give one dense dimension of float32 or float64"
            )
        return cls(address(array), str(array.dtype), array.size, array.flags.writeable)


def address(array: npt.NDArray[Any]) -> int:
    """Where the array's first element lies."""
    return int(array.__array_interface__["data"][0])
