"""Data of unequal batches, and the statistics that recalibration has to find in it."""

from __future__ import annotations

import numpy as np
from networks import randomize
from paddle import nn

import flatwater.paddle as fw
from flatwater import reference

# float32: the new statistics are rounded to it; a second layer reads what float32 layers computed.
STORED = {"rtol": 2e-7, "atol": 1e-7}
COMPUTED = {"rtol": 1e-5, "atol": 1e-6}


def data(*shape: int, sizes: tuple[int, ...] = (8, 8, 3), offset: float = 5.0) -> list[np.ndarray]:
    """Batches of unequal size whose means differ much, so that an average of averages would be wrong."""
    generator = np.random.default_rng(3)
    return [
        generator.normal(offset * (index + 1), index + 1.0, (size, *shape)).astype("float32")
        for index, size in enumerate(sizes)
    ]


def statistics_of(layer: nn.Layer) -> list[np.ndarray]:
    return [layer._mean.numpy().astype("float64"), layer._variance.numpy().astype("float64")]


def assert_statistics(layer: nn.Layer, inputs: list[np.ndarray], tolerance: dict[str, float], axis: int = 1) -> None:
    expected = reference.batch_statistics(np.concatenate(inputs), axis=axis)
    for found, value in zip(statistics_of(layer), (expected.mean, expected.variance), strict=True):
        np.testing.assert_allclose(found, value, **tolerance)


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def two_layers() -> nn.Layer:
    return randomize(nn.Sequential(nn.BatchNorm1D(3), nn.ReLU(), nn.Dropout(0.5), fw.BatchNorm1D(3)))


def normalized(layer: nn.Layer, x: np.ndarray, statistics: reference.Statistics | None = None) -> np.ndarray:
    """What ``layer`` makes of ``x`` with these statistics, None for its own, before a ReLU."""
    weight, bias = layer.weight.numpy(), layer.bias.numpy()
    return reference.batch_norm(x, weight=weight, bias=bias, statistics=statistics).y
