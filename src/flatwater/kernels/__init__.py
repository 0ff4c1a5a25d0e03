"""Normalization kernels on raw memory: no framework, no autograd.

A :class:`Buffer` says where a tensor lies, a :class:`Vector` where a parameter lies; statistics are
float64 NumPy arrays. The kernels run on the CPU, in the best instruction set that it has, on as many
threads as OpenMP may use, without the interpreter's lock, and give the same bits for any number of
threads. Import Paddle before the first kernel is used: the threads come from its OpenMP runtime then, and else from
GNU's, which keeps a second team beside Paddle's and has none in a process forked later, so that the child computes with
one thread. :mod:`~flatwater.kernels.pool` is memory for what they fill; a :class:`Step` is the short way for layers.
"""

from flatwater.kernels import pool
from flatwater.kernels.batch import (
    batch_gradient_sums,
    batch_input_gradient,
    batch_norm_backward,
    batch_norm_forward,
    batch_normalize,
    batch_statistics,
    store,
    update_running,
)
from flatwater.kernels.buffer import Buffer, Vector
from flatwater.kernels.group import group_norm_backward, group_norm_forward, group_normalize, group_statistics
from flatwater.kernels.launch import Statistics, available, isa, set_threads, threads
from flatwater.kernels.step import Step, begin

__all__ = [
    "Buffer",
    "Statistics",
    "Step",
    "Vector",
    "available",
    "batch_gradient_sums",
    "batch_input_gradient",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_normalize",
    "batch_statistics",
    "begin",
    "group_norm_backward",
    "group_norm_forward",
    "group_normalize",
    "group_statistics",
    "isa",
    "pool",
    "set_threads",
    "store",
    "threads",
    "update_running",
]
