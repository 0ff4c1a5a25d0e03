"""From a picture of a line to what the network takes: the one place where both happen, in training and in reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from flatwater.errors import DataError

__all__ = ["HEIGHT", "load_line", "normalize"]

HEIGHT = 32
_LEAST_WIDTH = 16  # narrower pictures would leave the network no step to say anything in
_MOST_WIDTH = 8192  # some 250 characters; a wider picture is not one line, or not worth the memory

Line = npt.NDArray[np.float32]


def normalize(pixels: npt.NDArray[np.floating]) -> Line:
    """Zero mean and unit deviation over the picture, so that paper and ink may have any brightness.

    Args:
        pixels: (HEIGHT, W), brightness in [0, 1].

    Returns:
        float32 (1, HEIGHT, W). A picture of one colour becomes zeros.
    """
    centred = pixels - pixels.mean()
    line: Line = (centred / (pixels.std() + 1e-3)).astype(np.float32)[None]
    return line


def load_line(path: Path) -> Line:
    """Read a picture, in any mode and size, as (1, HEIGHT, W), its proportions kept.

    Transparency is taken as white paper, and the camera's note of which way is up is followed.

    Raises:
        DataError: it is missing, damaged, no picture, or far too wide for a line.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = _in_eight_bits(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, FileNotFoundError | PermissionError) else "it is no intact picture"
        raise DataError(
            f"{path}: cannot be read as an image ({reason}); give a PNG or JPEG of one text line"
        ) from error
    width = round(picture.width * HEIGHT / picture.height)
    if width > _MOST_WIDTH:
        raise DataError(
            f"{path}: is {picture.width} x {picture.height} pixels, far too wide for one text line; cut it into pieces"
        )
    resized = picture.resize((max(_LEAST_WIDTH, width), HEIGHT), Image.Resampling.BICUBIC)
    return normalize(np.asarray(resized, dtype=np.float32) / 255.0)


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """Grey, 0 to 255; Pillow would cut 16-bit pictures off at 255 instead of scaling them."""
    if picture.mode.startswith(("I;16", "I")):
        return Image.fromarray((np.asarray(picture).astype(np.float64) / 257.0).clip(0, 255).astype(np.uint8))
    return picture.convert("L")
