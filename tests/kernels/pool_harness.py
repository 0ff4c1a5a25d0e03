"""Blocks of the pool in Python: a capsule adopted by NumPy, or looked into; and code in a process of its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from flatwater.kernels import pool

MIB = 1 << 20

# (code, bits) as dlpack.h numbers them.
DLPACK_TYPES = {"float32": (2, 32), "float64": (2, 64), "bfloat16": (4, 16), "float16": (2, 16)}


class DLTensor(ctypes.Structure):
    """As dlpack.h has it; the DLManagedTensor of a capsule begins with one."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Lent:
    """A capsule as the object that ``numpy.from_dlpack`` asks for one."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def look_into(capsule: Any) -> DLTensor:
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return DLTensor.from_address(address(capsule, b"dltensor"))


def take(size: int) -> np.ndarray:
    """A block of ``size`` bytes, a multiple of 8."""
    return np.from_dlpack(Lent(pool.empty_capsule((size // 8,), "float64")))


def block_size(size: int) -> int:
    """What the pool takes for ``size`` bytes: eight sizes between one power of two and the next, 64 at the least."""
    size = max(size, 64)
    unit = max((1 << (size.bit_length() - 1)) // 8, 64)
    return -(-size // unit) * unit


def run(code: str) -> str:
    """What the code prints in a process of its own, which a test's modules can be imported in."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
