"""Fashion-MNIST from the files that Debian's package installs, and the batches of one training."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

__all__ = ["FOLDER", "Data", "batches", "load"]

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts them."""

VALIDATION = 10_000
"""The last training images: learning rates are chosen on them, and nothing is trained on them."""

SHIFT = 2
"""Pixels by which a training image may be shifted in each direction."""

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Split = tuple[Images, Labels]


@dataclass(frozen=True)
class Data:
    """Images of 28×28 with mean 0 and deviation 1 over the training set, [n, 1, 28, 28], and their classes."""

    train: Split
    validation: Split
    test: Split


def load(folder: Path) -> Data:
    """Read the four files in ``folder``.

    Raises:
        click.ClickException: one is not there, or not what its name says.
    """
    images, labels = _read(folder / "train-images-idx3-ubyte.gz"), _read(folder / "train-labels-idx1-ubyte.gz")
    mean, deviation = images.mean(), images.std()

    def split(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> Split:
        return ((images[:, None] - mean) / deviation).astype(np.float32), labels.astype(np.int64)

    return Data(
        split(images[:-VALIDATION], labels[:-VALIDATION]),
        split(images[-VALIDATION:], labels[-VALIDATION:]),
        split(_read(folder / "t10k-images-idx3-ubyte.gz"), _read(folder / "t10k-labels-idx1-ubyte.gz")),
    )


def batches(data: Split, size: int, seed: int, epoch: int) -> Iterator[Split]:
    """An epoch in random order, images shifted and mirrored at random: the same for each norm. The rest is left out."""
    images, labels = data
    random = np.random.default_rng((seed, epoch))
    padded = np.pad(images[:, 0], ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[2:], axis=(1, 2))  # type: ignore[call-overload]
    order = random.permutation(len(images))
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        down, right = random.integers(0, 2 * SHIFT + 1, (2, size))
        batch = windows[chosen, down, right]
        mirrored = random.random(size) < 0.5
        batch = np.where(mirrored[:, None, None], batch[:, :, ::-1], batch)
        yield np.ascontiguousarray(batch[:, None]), labels[chosen]


def _read(path: Path) -> npt.NDArray[np.uint8]:
    """An array in the IDX format: two zero bytes, the type (8: bytes), the rank, the sizes, the values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except OSError as error:
        raise click.ClickException(
            f"{path}: {error.strerror or error}; install Debian's package dataset-fashion-mnist, or give --data"
        ) from error
    rank = content[3] if content[:3] == b"\0\0\x08" else 0
    shape = tuple(np.frombuffer(content, ">u4", rank, 4))
    if not rank or len(content) != 4 + 4 * rank + int(np.prod(shape)):
        raise click.ClickException(f"{path}: is no array of bytes in the IDX format, or is cut off")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
