"""Convolution, batch norm, activation: the block that convolutional networks are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle

from flatwater.paddle.layers import BatchNorm2D
from flatwater.spec import SingleValue

__all__ = ["ConvBNLayer"]


class ConvBNLayer(paddle.nn.Layer):
    """``act(BN(conv(x)) + residual)``: convolution without bias, batch norm, activation.

    The convolution has no bias because the norm subtracts it again at once. Sublayers are ``conv``
    (``paddle.nn.Conv2D``) and ``bn`` (:class:`~flatwater.paddle.BatchNorm2D`, with the activation fused in).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, groups, dilation: as ``paddle.nn.Conv2D``
            has them. The defaults keep the size: 3 × 3, stride 1, padding 1.
        act: the activation, see :mod:`flatwater.paddle.layers`; None for none.
        momentum, epsilon, use_global_stats: as ``paddle.nn.BatchNorm2D`` has them.
        weight_attr: ``ParamAttr`` of the convolution's weight.
        bn_weight_attr, bn_bias_attr: ``ParamAttr`` of γ and β, for instance with an initial value of
            one's own: ``paddle.ParamAttr(initializer=paddle.nn.initializer.Constant(0.0))``.
        data_format: ``"NCHW"`` or ``"NHWC"``.
        single_value: what training does with one value per channel, see :mod:`flatwater.paddle.layers`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 1,
        groups: int = 1,
        act: str | None = "relu",
        *,
        dilation: int | Sequence[int] = 1,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        use_global_stats: bool | None = None,
        weight_attr: Any = None,
        bn_weight_attr: Any = None,
        bn_bias_attr: Any = None,
        data_format: str = "NCHW",
        single_value: SingleValue = "error",
    ) -> None:
        super().__init__()
        self.conv = paddle.nn.Conv2D(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            weight_attr=weight_attr,
            bias_attr=False,
            data_format=data_format,
        )
        self.bn = BatchNorm2D(
            out_channels,
            momentum=momentum,
            epsilon=epsilon,
            weight_attr=bn_weight_attr,
            bias_attr=bn_bias_attr,
            data_format=data_format,
            use_global_stats=use_global_stats,
            act=act,
            single_value=single_value,
        )

    def forward(self, x: paddle.Tensor, residual: paddle.Tensor | None = None) -> paddle.Tensor:
        """``act(BN(conv(x)) + residual)``; the residual has the shape of the result."""
        return self.bn(self.conv(x)) if residual is None else self.bn(self.conv(x), residual)
