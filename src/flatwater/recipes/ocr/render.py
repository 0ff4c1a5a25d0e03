"""Lines of text as a camera or scanner might see them, composed with NumPy from glyphs drawn once.

What varies from line to line: font, size, spacing, where each glyph stands to the pixel, slant, blur, the
brightness of ink and paper, whether ink is darker or brighter than paper, slopes and waves of the paper's
brightness, and noise. All of it is drawn from the generator that the caller gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flatwater.recipes.ocr.fonts import Font
from flatwater.recipes.ocr.labels import Alphabet
from flatwater.recipes.ocr.preprocess import HEIGHT

__all__ = ["Rendered", "render"]

_SPARE = 12  # rows and columns around the picture, so that no glyph has to be cut while it is put in its place

Array = npt.NDArray[np.float32]


class Rendered(NamedTuple):
    """Pictures of the chosen lines: float32 [N, 32, W] in [0, 1]; columns from ``widths`` on belong to no line.

    ``centres`` and ``advances`` tell, for each line, the column of each character's middle and its width.
    """

    pixels: Array
    widths: npt.NDArray[np.int64]
    centres: list[list[float]]
    advances: list[list[float]]
    fonts: list[str]


def render(
    texts: Sequence[str],
    alphabet: Alphabet,
    fonts: Sequence[Font],
    sizes: Sequence[int],
    generator: np.random.Generator,
    multiple: int = 1,
    chosen: slice = slice(None),
) -> Rendered:
    """Draw each text in one of the fonts and sizes; the batch's width is a multiple of ``multiple``.

    Of the texts, pictures are made of the ``chosen`` alone, the same as where all are: what is random about the others
    is drawn from the generator too, and they decide the width with them.
    """
    placed = [_place(text, alphabet, fonts, sizes, generator) for text in texts]
    width = -(-max(line.width for line in placed) // multiple) * multiple
    lines = placed[chosen]
    widths = np.array([line.width for line in lines], np.int64)
    draws = _Draws(generator, len(texts), chosen)
    ink = np.zeros((len(lines), HEIGHT + 2 * _SPARE, width + 2 * _SPARE), np.uint8)
    for canvas, line in zip(ink, lines, strict=True):
        for glyph, row, column in line.glyphs:
            area = canvas[row : row + glyph.shape[0], column : column + glyph.shape[1]]
            np.maximum(area, glyph[: area.shape[0], : area.shape[1]], out=area)
    coverage = ink[:, _SPARE:-_SPARE, _SPARE:-_SPARE].astype(np.float32) / np.float32(255)
    coverage = _blur(_slant(coverage, draws), draws)
    return Rendered(
        pixels=_photograph(coverage, widths, draws),
        widths=widths,
        centres=[line.centres for line in lines],
        advances=[line.advances for line in lines],
        fonts=[line.font for line in lines],
    )


class _Draws:
    """What is random about each line, drawn for all of them and given for the chosen."""

    def __init__(self, generator: np.random.Generator, count: int, chosen: slice) -> None:
        self._generator = generator
        self._count = count
        self._chosen = chosen

    def uniform(self, low: float, high: float, dimensions: int) -> npt.NDArray[np.float64]:
        """One number a line, [N, 1 ...] of so many dimensions."""
        return self._generator.uniform(low, high, (self._count, *[1] * (dimensions - 1)))[self._chosen]

    def happens(self, probability: float) -> npt.NDArray[np.bool_]:
        """Whether something happens to each line."""
        return (self._generator.random(self._count) < probability)[self._chosen]

    def noise(self, height: int, width: int) -> Array:
        """Normal deviates, [N, height, width]."""
        return self._generator.standard_normal((self._count, height, width), dtype=np.float32)[self._chosen]


class _Line(NamedTuple):
    font: str
    width: int
    glyphs: list[tuple[npt.NDArray[np.uint8], int, int]]
    centres: list[float]
    advances: list[float]


def _place(
    text: str, alphabet: Alphabet, fonts: Sequence[Font], sizes: Sequence[int], generator: np.random.Generator
) -> _Line:
    font = fonts[int(generator.integers(len(fonts)))]
    atlas = font.atlas(sizes[int(generator.integers(len(sizes)))])
    left, right = generator.integers(1, 9, 2)
    spacing = generator.uniform(-1.0, 3.0)
    shift = generator.integers(-1, 2)
    jitter = generator.integers(-1, 2, (len(text), 2))
    top = _SPARE + (HEIGHT - atlas.ink.shape[1]) // 2 + int(shift)

    pen = float(left)
    glyphs, centres, advances = [], [], []
    for number, (down, across) in zip(alphabet.encode(text), jitter, strict=True):
        advance = float(atlas.advance[number - 1])
        column = max(0, round(pen) + int(across) + _SPARE - atlas.origin)
        glyphs.append((atlas.ink[number - 1], top + int(down), column))
        centres.append(column - _SPARE + atlas.origin + advance / 2)
        advances.append(advance)
        pen += advance + spacing
    return _Line(font.name, math.ceil(pen - spacing) + int(right), glyphs, centres, advances)


def _slant(coverage: Array, draws: _Draws) -> Array:
    """Lean every third line by up to 0.15 columns a row."""
    _, height, width = coverage.shape
    lean = draws.uniform(-0.15, 0.15, 2) * draws.happens(1 / 3)[:, None]
    shift = np.rint(lean * (np.arange(height) - (height - 1) / 2)).astype(np.int64)
    columns = np.arange(width) - shift[:, :, None]
    slanted: Array = np.take_along_axis(coverage, columns.clip(0, width - 1), axis=2)
    return slanted


def _blur(coverage: Array, draws: _Draws) -> Array:
    """Smear every second line, each axis by its own amount: the kernel is (k, 1 - 2k, k)."""
    strengths = np.stack([draws.uniform(0.0, 0.28, 3) for _ in range(2)]).astype(np.float32)
    strengths *= draws.happens(0.5)[:, None, None]
    for axis in (1, 2):
        before, here, after = (_part(coverage, axis, start) for start in (0, 1, 2))
        here += strengths[axis - 1] * (before + after - 2 * here)
    return coverage


def _part(array: Array, axis: int, start: int) -> Array:
    """``array`` without ``start`` entries at the one end of an axis and without ``2 - start`` at the other."""
    index = [slice(None)] * array.ndim
    index[axis] = slice(start, array.shape[axis] - 2 + start)
    return array[tuple(index)]


def _photograph(coverage: Array, widths: npt.NDArray[np.int64], draws: _Draws) -> Array:
    """Ink on uneven paper, with noise: float32 in [0, 1]."""
    _, height, width = coverage.shape

    def draw(low: float, high: float) -> Array:
        return draws.uniform(low, high, 3).astype(np.float32)

    x = np.linspace(0, 1, width, dtype=np.float32) * (width / widths.astype(np.float32))[:, None, None]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    paper = draw(0.5, 1.0)
    ink = paper * draw(0.0, 0.6)
    uneven = draw(-0.2, 0.2) * (x - 0.5) + draw(-0.08, 0.08) * y
    uneven += draw(0.0, 0.06) * np.sin(draw(2.0, 14.0) * x + draw(-2.0, 2.0) * y + draw(0.0, 6.3))
    pixels = paper + uneven + (ink - paper) * coverage
    pixels += draw(0.0, 0.09) * draws.noise(height, width)
    inverted = draw(0.0, 1.0) < 0.2
    clipped: Array = np.clip(np.where(inverted, 1 - pixels, pixels), 0, 1)
    return clipped
