"""Which computes a layer's call: Flatwater's kernels or Paddle's operators. Decided here and nowhere else."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Literal

import paddle

from flatwater.kernels import available
from flatwater.paddle.dtypes import dtype_name

__all__ = ["Backend", "choose_backend", "is_replay"]

Backend = Literal["flatwater", "paddle"]

# Paddle asks half a microsecond for the place of a tensor, and a wheel for the CPU knows only one.
_OTHER_DEVICES = bool(
    paddle.is_compiled_with_cuda()
    or paddle.is_compiled_with_rocm()
    or paddle.is_compiled_with_xpu()
    or paddle.device.get_all_custom_device_type()
)


@paddle.jit.not_to_static
def choose_backend(x: paddle.Tensor, parameters: list[paddle.Tensor], *, training: bool) -> Backend:
    """``"flatwater"`` for training in plain dynamic mode on the CPU, else ``"paddle"``.

    Paddle's own operators are taken

    * in ``eval()``, so that what is exported is native;
    * in a graph that is being captured (static mode, ``to_static``), where raw memory does not exist;
    * on every other device and for every other dtype.
    """
    if not (training and paddle.in_dynamic_mode()) or not isinstance(x, paddle.Tensor):
        return "paddle"
    if _OTHER_DEVICES and not all(tensor.place.is_cpu_place() for tensor in (x, *parameters)):
        return "paddle"
    return "flatwater" if available(dtype_name(x)) else "paddle"


@paddle.jit.not_to_static
def is_replay() -> bool:
    """Whether this forward pass is ``recompute`` doing it again for the backward pass.

    Statistics were updated the first time. Both of Paddle's implementations replay from a function
    of their own: the backward of a ``PyLayer``, or the unpacking of a saved tensor.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("backward", "unpack") and "recompute" in code.co_filename:
            return True
        frame = frame.f_back
    return False
