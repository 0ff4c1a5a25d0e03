"""Paddle's dtypes by the names that the kernels know."""

from __future__ import annotations

import paddle

__all__ = ["dtype_name"]

_FLOAT32 = paddle.float32
_NAMES = {dtype: str(dtype).removeprefix("paddle.") for dtype in (paddle.float64, paddle.bfloat16, paddle.float16)}


def dtype_name(tensor: paddle.Tensor) -> str:
    """For instance ``"float32"``. Looked up, because this is asked several times in each training step."""
    dtype = tensor.dtype
    # Paddle makes each dtype once; to compare two of them, or to hash one, takes it half a microsecond.
    if dtype is _FLOAT32:
        return "float32"
    return _NAMES.get(dtype) or str(dtype).removeprefix("paddle.")
