"""One norm in one training step: the road of the layers, which have looked at their tensors already.

The functions of :mod:`~flatwater.kernels.batch` and :mod:`~flatwater.kernels.group` check what they are given;
a :class:`Step` believes it, remembers it from the forward pass for the backward pass, and takes one call each way.
"""

from __future__ import annotations

from flatwater.kernels._cpu import Step
from flatwater.kernels.buffer import DTYPES
from flatwater.kernels.launch import ready
from flatwater.spec import ACTIVATIONS, Activation

__all__ = ["Step", "begin"]


def begin(
    shape: tuple[int, int, int],
    dtype: str,
    *,
    channels_last: bool,
    activation: Activation,
    epsilon: float,
    groups: int | None = None,
) -> Step:
    """A step on dense tensors of one shape and dtype.

    Tensors go in by address, 0 for what there is not, and stay the caller's. Parameters, their gradients and running
    statistics are one value per channel: float64 if the tensors are, else float32.

    Args:
        shape: ``(outer, channels, inner)``, as in :class:`~flatwater.kernels.Buffer`.
        dtype: one of :data:`~flatwater.kernels.buffer.DTYPES`.
        channels_last: how memory holds the shape.
        activation: fused after γ·x̂ + β + residual.
        epsilon: added to the variance.
        groups: of channels, for statistics of each sample and group; None for those of each channel over the batch.

    Raises:
        BackendError: ``FLATWATER_ISA`` names an instruction set that is not there.
    """
    ready()
    return Step(DTYPES.index(dtype), ACTIVATIONS.index(activation), *shape, channels_last, groups or 0, epsilon)
