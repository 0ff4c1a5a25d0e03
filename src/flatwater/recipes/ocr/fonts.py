"""Fonts, and their glyphs drawn once and kept."""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from flatwater.errors import DataError

__all__ = ["Atlas", "Font", "packaged_file", "training_fonts", "unseen_font"]

_MARGIN = 3  # pixels around a glyph, for strokes that leave its em square
_CENTRE = 0.37  # of the size: how far the middle of a CJK glyph stands above the baseline
_UNASSIGNED = "\U0010ffff"  # a noncharacter: what a font draws for it, it draws for every glyph it lacks


class Atlas(NamedTuple):
    """All glyphs of a font in one size, in equal boxes with the middle of the line in the middle of each.

    ``ink`` is uint8 [characters, height, width], 255 where the glyph is; ``advance`` is how far each moves the
    pen, in pixels; the pen stands at column ``origin`` of a box.
    """

    ink: npt.NDArray[np.uint8]
    advance: npt.NDArray[np.float32]
    origin: int


class Font:
    """A font file for an alphabet.

    Raises:
        DataError: the file is no font, or lacks characters of the alphabet.
    """

    def __init__(self, path: Path, characters: str) -> None:
        self.path = path
        self.name = path.stem
        self._characters = characters
        self._atlases: dict[int, Atlas] = {}
        self._check_coverage()

    def atlas(self, size: int) -> Atlas:
        """Its glyphs at a size; drawn when first asked for."""
        if size not in self._atlases:
            self._atlases[size] = self._draw(size)
        return self._atlases[size]

    def _open(self, size: int) -> ImageFont.FreeTypeFont:
        try:
            return ImageFont.truetype(str(self.path), size)
        except OSError as error:
            reason = "no such file" if not self.path.exists() else "no font that FreeType can read"
            raise DataError(f"{self.path}: {reason}; give a .ttf, .otf or .ttc file") from error

    def _check_coverage(self) -> None:
        font = self._open(16)
        absent = bytes(font.getmask(_UNASSIGNED))
        lacking = [
            character
            for character in self._characters
            if not character.isspace() and bytes(font.getmask(character)) in (absent, b"")
        ]
        if lacking:
            shown = "".join(lacking[:10]) + ("…" if len(lacking) > 10 else "")
            raise DataError(
                f"{self.path}: lacks {len(lacking)} of the {len(self._characters)} characters ({shown}); "
                "choose another font, or lower data.characters"
            )

    def _draw(self, size: int) -> Atlas:
        font = self._open(size)
        advance = np.array([font.getlength(character) for character in self._characters], np.float32)
        width = math.ceil(float(advance.max())) + 2 * _MARGIN
        height = size + 2 * _MARGIN
        baseline = round(height / 2 + _CENTRE * size)
        ink = np.empty((len(self._characters), height, width), np.uint8)
        for box, character in zip(ink, self._characters, strict=True):
            canvas = Image.new("L", (width, height))
            ImageDraw.Draw(canvas).text((_MARGIN, baseline), character, fill=255, font=font, anchor="ls")
            box[:] = np.asarray(canvas)
        return Atlas(ink, advance, _MARGIN)


def training_fonts() -> tuple[Path, ...]:
    """NotoSansSC and NotoSerifSC, which the package pylopdf-fonts-zh-cn ships."""
    package = "pylopdf_fonts_zh_cn"
    return (packaged_file(package, "NotoSansSC-Regular.otf"), packaged_file(package, "NotoSerifSC-Regular.otf"))


def unseen_font() -> Path:
    """wqy-microhei, which the package paperang-p2-fonts-cjk ships."""
    return packaged_file("paperang_p2_fonts_cjk", "fonts/wqy-microhei.ttc")


@functools.cache
def packaged_file(package: str, name: str) -> Path:
    """A file of an installed package, found without importing it.

    Raises:
        DataError: the package or the file is not there.
    """
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [Path(folder) / name for folder in folders if (Path(folder) / name).is_file()]
    if not found:
        raise DataError(f"{name} of the package {package} is not installed; run: pip install 'flatwater[ocr]'")
    return found[0]
