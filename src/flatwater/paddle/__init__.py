"""Flatwater for PaddlePaddle: ``import flatwater.paddle as fw``."""

from flatwater.paddle import nn
from flatwater.paddle.conv import ConvBNLayer
from flatwater.paddle.convert import ConversionReport, convert, revert
from flatwater.paddle.layers import (
    BatchNorm,
    BatchNorm1D,
    BatchNorm2D,
    BatchNorm3D,
    GroupNorm,
    InstanceNorm1D,
    InstanceNorm2D,
    InstanceNorm3D,
    backend_of,
)

__all__ = [
    "BatchNorm",
    "BatchNorm1D",
    "BatchNorm2D",
    "BatchNorm3D",
    "ConvBNLayer",
    "ConversionReport",
    "GroupNorm",
    "InstanceNorm1D",
    "InstanceNorm2D",
    "InstanceNorm3D",
    "backend_of",
    "convert",
    "nn",
    "revert",
]
