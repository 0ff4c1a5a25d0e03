"""Where the tensors that the kernels fill come from."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from math import prod

import paddle
from paddle import _C_ops
from paddle.base.core import eager, from_dlpack

from flatwater.host.settings import kept_by_malloc
from flatwater.kernels import pool
from flatwater.paddle.dtypes import dtype_name

__all__ = ["empty_like", "follow_malloc", "pooled_from"]

_CPU = paddle.CPUPlace()


_SMALL = 1 << 18


def pooled_from(environment: Mapping[str, str]) -> int:
    """The size in bytes from which a tensor lies in the pool.

    Smaller ones stay with the C library's allocator, which Paddle reaches in 1 µs instead of 5, and which keeps their
    memory by itself: up to a quarter MiB, or as far as glibc's was told to (``flatwater run`` and ``host.tune()`` tell
    it). Then norms and convolutions share what one of them has freed, while it is still in a cache.
    """
    return max(kept_by_malloc(environment), _SMALL)


_POOLED_FROM = pooled_from(os.environ)
_MAIN = threading.main_thread().ident


def follow_malloc() -> None:
    """Let :func:`pooled_from` look again, once ``host.tune()`` has told the C library to keep more."""
    global _POOLED_FROM
    _POOLED_FROM = pooled_from(os.environ)


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
