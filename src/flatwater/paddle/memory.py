"""Where the tensors that the kernels fill come from."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from math import prod

import paddle
from paddle import _C_ops
from paddle.base.core import eager, from_dlpack

from flatwater.kernels import pool
from flatwater.paddle.dtypes import dtype_name

__all__ = ["empty_like", "pooled_from"]

_CPU = paddle.CPUPlace()


_SMALL = 1 << 18


def pooled_from(environment: Mapping[str, str]) -> int:
    """The size in bytes from which a tensor lies in the pool.

    Smaller ones stay with the C library's allocator, which Paddle reaches in 1 µs instead of 5, and which keeps their
    memory by itself: up to a quarter MiB, or as far as it was told to when the process started (``flatwater run``
    tells it). Then norms and convolutions share what one of them has freed, while it is still in a cache.
    """
    told = [environment.get(name, "") for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")]
    kept = min(int(size) if size.isdigit() else 0 for size in told)
    return max(kept, _SMALL)


_POOLED_FROM = pooled_from(os.environ)
_MAIN = threading.main_thread().ident


def empty_like(tensor: paddle.Tensor) -> paddle.Tensor:
    """A dense CPU tensor of the same shape and dtype with undefined values, needing no gradient.

    Large ones lie in the pool (:mod:`flatwater.kernels.pool`), so that in the steady state of training they cost no
    page faults; their memory returns to it when the last view is gone.
    """
    # Both roads are those of paddle.empty_like and paddle.utils.dlpack.from_dlpack without their looks at the
    # arguments, which would take longer than the work: a training step comes here four times for each norm.
    size = prod(tensor.shape) * tensor.element_size()
    # Other threads have heaps of at most 64 MiB in the C library, which keeps nothing larger for them, told or not.
    if size < _POOLED_FROM and (size < _SMALL or threading.get_ident() == _MAIN):
        return _C_ops.empty_like(tensor, tensor.dtype, _CPU)
    return eager.Tensor(from_dlpack(pool.empty_capsule(tensor.shape, dtype_name(tensor))))
