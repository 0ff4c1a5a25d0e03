"""The tensors that are measured: every distinct input of a norm layer in the models below, as data.

Shapes are (N, C, H, W). A test derives those of ResNet-50 and MobileNetV3 from ``paddle.vision.models`` and those of
``flatwater-ocr`` from this repository's recogniser. PP-OCRv4's are worked out by hand from the table of blocks
``NET_CONFIG_rec`` and the rounding of channels in PaddleOCR's ``ppocr/modeling/backbones/rec_lcnetv3.py`` (PPLCNetV3,
scale 0.95, stem of stride 2), the backbone of its mobile recogniser.
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = [
    "LARGE_BYTES",
    "LAYOUTS",
    "MODELS",
    "QUICK",
    "SMALL_BYTES",
    "Case",
    "Shape",
    "cases",
    "groups",
    "memory_shape",
]

Shape = tuple[int, int, int, int]

LAYOUTS = ("NCHW", "NHWC")

LARGE_BYTES = 25e6
"""From here on a tensor is held to the limit for large ones."""

SMALL_BYTES = 1e6
"""From here up to :data:`LARGE_BYTES` it is held to the limit for small ones; below, a call costs more than memory."""


class Case(NamedTuple):
    """A tensor, and the models in which a norm layer reads it."""

    shape: Shape
    models: tuple[str, ...]

    @property
    def name(self) -> str:
        """As in ``32x64x56x56``."""
        return "x".join(map(str, self.shape))

    @property
    def nbytes(self) -> int:
        """In float32."""
        return 4 * math.prod(self.shape)

    @property
    def size(self) -> str:
        """``"large"``, ``"small"`` or ``"tiny"``: which limit applies, if any."""
        return "large" if self.nbytes >= LARGE_BYTES else "small" if self.nbytes >= SMALL_BYTES else "tiny"


def _planes(batch: int, *planes: tuple[int, int, int]) -> tuple[Shape, ...]:
    return tuple((batch, *plane) for plane in planes)


MODELS: dict[str, tuple[Shape, ...]] = {
    "resnet50": _planes(
        32,
        *((64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 56, 56)),
        *((128, 28, 28), (512, 28, 28), (256, 28, 28)),
        *((256, 14, 14), (1024, 14, 14), (512, 14, 14), (512, 7, 7), (2048, 7, 7)),
    ),
    "mobilenetv3": _planes(
        32,
        *((16, 112, 112), (64, 112, 112), (64, 56, 56), (24, 56, 56), (72, 56, 56)),
        *((72, 28, 28), (40, 28, 28), (120, 28, 28), (240, 28, 28)),
        *((240, 14, 14), (80, 14, 14), (200, 14, 14), (184, 14, 14), (480, 14, 14), (112, 14, 14), (672, 14, 14)),
        *((672, 7, 7), (160, 7, 7), (960, 7, 7)),
    ),
    "pp-ocrv4": _planes(
        64,
        *((16, 24, 160), (32, 24, 160), (64, 24, 160), (64, 12, 160), (128, 12, 160), (128, 12, 80), (240, 12, 80)),
        *((240, 6, 80), (480, 6, 80), (480, 3, 80)),
    ),
    "flatwater-ocr": _planes(64, (32, 16, 160), (64, 8, 80), (128, 8, 80), (192, 4, 80), (320, 1, 80)),
    "8x64x224x224": ((8, 64, 224, 224),),
}
"""ResNet-50 and MobileNetV3-large at 224×224, PP-OCRv4's mobile recogniser at 48×320, this repository's at 32×320."""

QUICK: tuple[Shape, ...] = (
    (8, 64, 224, 224),
    (32, 256, 56, 56),
    (32, 128, 28, 28),
    (32, 256, 14, 14),
    (32, 960, 7, 7),
    (64, 240, 12, 80),
)
"""One of each kind: past every cache, at its edge, inside it, small planes, planes that fill no vector, text lines."""


def memory_shape(shape: Shape, layout: str) -> Shape:
    """The shape of the dense array that holds ``shape`` in a layout."""
    samples, channels, height, width = shape
    return (samples, height, width, channels) if layout == "NHWC" else shape


def groups(channels: int) -> int:
    """Group norm's: 32, as in the paper, or 8 where 32 does not divide the channels."""
    return 8 if channels % 32 else 32


def cases(models: tuple[str, ...] = (), *, quick: bool = False) -> list[Case]:
    """The distinct shapes of these models (all of them if none is named), the largest first.

    Args:
        models: keys of :data:`MODELS`.
        quick: only those in :data:`QUICK`.
    """
    found: dict[Shape, tuple[str, ...]] = {}
    for model in models or MODELS:
        for shape in MODELS[model]:
            found[shape] = (*found.get(shape, ()), model)
    chosen = [Case(shape, users) for shape, users in found.items() if not quick or shape in QUICK]
    return sorted(chosen, key=lambda case: case.nbytes, reverse=True)
