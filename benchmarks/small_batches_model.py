"""The network of :mod:`benchmarks.small_batches`, and ranks with statistics of their own in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import paddle
from paddle import nn

import flatwater.paddle as fw
from flatwater.paddle.autograd import normalize
from flatwater.paddle.calls import NormCall

__all__ = ["MOMENTA", "Network", "RankBatchNorm", "deployed"]

MOMENTA = (0.5, 0.9, 0.99)
"""Paddle's: the share of the OLD statistics that is kept. Followed side by side, for training does not depend on it."""

WIDTHS = ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
"""Channels in and out of each convolution, and its stride."""

Array = npt.NDArray[np.float64]


class RankBatchNorm(nn.Layer):
    """Batch norm and ReLU as ``ranks`` ranks under DataParallel compute them, each from its own share of the batch.

    Sample n belongs to rank n mod ranks, as ``DistributedBatchSampler`` deals them. So [samples, C, H, W], read as
    [samples / ranks, ranks·C, H, W], has a channel of its own for each rank and channel, and one batch norm computes
    them all. γ and β are shared: their gradients are sums over ranks, and the mean loss makes them DataParallel's
    average.
    """

    def __init__(self, channels: int, ranks: int) -> None:
        super().__init__()
        self._ranks = ranks
        self.weight = self.create_parameter([channels], default_initializer=nn.initializer.Constant(1.0))
        self.bias = self.create_parameter([channels], is_bias=True)
        self._mean, self._variance = paddle.zeros([2 * ranks * channels]).split(2)  # of the last batch
        shape = (len(MOMENTA), ranks, channels)
        self._means, self._variances = np.zeros(shape), np.ones(shape)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """Normalize each rank's share, and follow each rank's moving statistics."""
        samples, channels, height, width = x.shape
        call = NormCall(channels_last=False, activation="relu", epsilon=1e-5)
        apart = x.reshape([samples // self._ranks, self._ranks * channels, height, width])
        y = normalize(apart, self.weight.tile([self._ranks]), self.bias.tile([self._ranks]), None, call)
        call.update(self._mean, self._variance, momentum=0.0, unbiased=False)
        for index, momentum in enumerate(MOMENTA):
            for moving, batch in ((self._means, self._mean), (self._variances, self._variance)):
                moving[index] += (1 - momentum) * (batch.numpy().reshape(self._ranks, channels) - moving[index])
        return y.reshape([samples, channels, height, width])

    def moving(self, momentum: float, *, averaged: bool) -> tuple[Array, Array]:
        """Moving mean and variance: what ``fw.average_statistics`` makes of all ranks, or rank 0's own."""
        index = MOMENTA.index(momentum)
        means, variances = self._means[index], self._variances[index]
        if not averaged:
            return means[0], variances[0]
        mean = means.mean(0)
        return mean, (variances + (means - mean) ** 2).mean(0)


class Network(nn.Layer):
    """Five convolutions, a norm with ReLU behind each, average pooling and a linear layer: 28×28 images, ten classes.

    Args:
        norm: makes norm and ReLU for so many channels.
    """

    def __init__(self, norm: Callable[[int], nn.Layer]) -> None:
        super().__init__()
        layers: list[nn.Layer] = []
        for before, channels, stride in WIDTHS:
            layers += [nn.Conv2D(before, channels, 3, stride, 1, bias_attr=False), norm(channels)]
        layers += [nn.AdaptiveAvgPool2D(1), nn.Flatten(1), nn.Linear(WIDTHS[-1][1], 10)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        """Logits, [samples, 10]."""
        return self.layers(images)


def deployed(network: Network, momentum: float, *, averaged: bool = True) -> Network:
    """The network with plain batch norms, which hold the moving statistics that :meth:`RankBatchNorm.moving` gives."""
    plain = Network(partial(fw.BatchNorm2D, act="relu"))
    for layer, source in zip(plain.layers, network.layers, strict=True):
        for name, parameter in source.named_parameters(include_sublayers=False):
            getattr(layer, name).set_value(parameter)
        if isinstance(source, RankBatchNorm):
            mean, variance = source.moving(momentum, averaged=averaged)
            layer._mean.set_value(mean.astype("float32"))
            layer._variance.set_value(variance.astype("float32"))
    plain.eval()
    return plain
