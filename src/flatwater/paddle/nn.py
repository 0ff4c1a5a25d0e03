"""``paddle.nn`` with Flatwater's norm layers in place of Paddle's.

So that a file changes one line: ``import flatwater.paddle.nn as nn``. Every other name is Paddle's.
"""

from __future__ import annotations

from typing import Any

import paddle.nn

from flatwater.paddle.layers import (
    BatchNorm,
    BatchNorm1D,
    BatchNorm2D,
    BatchNorm3D,
    GroupNorm,
    InstanceNorm1D,
    InstanceNorm2D,
    InstanceNorm3D,
)
from flatwater.paddle.sync.layer import SyncBatchNorm

__all__ = [
    "BatchNorm",
    "BatchNorm1D",
    "BatchNorm2D",
    "BatchNorm3D",
    "GroupNorm",
    "InstanceNorm1D",
    "InstanceNorm2D",
    "InstanceNorm3D",
    "SyncBatchNorm",
]


def __getattr__(name: str) -> Any:
    try:
        return getattr(paddle.nn, name)
    except AttributeError:
        raise AttributeError(f"neither flatwater.paddle.nn nor paddle.nn has {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*dir(paddle.nn), *__all__})
