"""Paddle's dtypes by the names that the kernels know."""

from __future__ import annotations

import paddle

__all__ = ["dtype_name"]

_NAMES = {
    dtype: str(dtype).removeprefix("paddle.")
    for dtype in (paddle.float32, paddle.float64, paddle.bfloat16, paddle.float16)
}


def dtype_name(tensor: paddle.Tensor) -> str:
    """For instance ``"float32"``. Looked up, because this is asked several times in each training step."""
    dtype = tensor.dtype
    return _NAMES.get(dtype) or str(dtype).removeprefix("paddle.")
