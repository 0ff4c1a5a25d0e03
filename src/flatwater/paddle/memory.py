"""Where the tensors that the kernels fill come from."""

from __future__ import annotations

from math import prod

import paddle
from paddle import _C_ops
from paddle.base.core import eager, from_dlpack

from flatwater.kernels import pool
from flatwater.paddle.dtypes import dtype_name

__all__ = ["POOLED_BYTES", "empty_like"]

POOLED_BYTES = 1 << 18
"""A tensor from this size on lies in the pool. Smaller ones stay with the C library's allocator, which keeps their
memory by itself and which Paddle reaches in 1 µs instead of 5."""


def empty_like(tensor: paddle.Tensor) -> paddle.Tensor:
    """A dense CPU tensor of the same shape and dtype with undefined values, needing no gradient.

    Large ones lie in the pool (:mod:`flatwater.kernels.pool`), so that in the steady state of training they cost no
    page faults; their memory returns to it when the last view is gone.
    """
    # Both roads are those of paddle.empty_like and paddle.utils.dlpack.from_dlpack without their looks at the
    # arguments, which would take longer than the work: a training step comes here four times for each norm.
    if prod(tensor.shape) * tensor.element_size() < POOLED_BYTES:
        return _C_ops.empty_like(tensor, tensor.dtype, tensor.place)
    return eager.Tensor(from_dlpack(pool.empty_capsule(tensor.shape, dtype_name(tensor))))
