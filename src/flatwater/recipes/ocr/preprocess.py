"""An image of one line as the recogniser sees it, in training and in reading. NumPy and Pillow only.

A line is a float32 array [1, 32, W]: grey, 32 high with its aspect kept, and with mean 0 and deviation 1 over
its own pixels, so that brightness, contrast and the depth of the paper's colour do not matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from flatwater.errors import DataError

__all__ = ["HEIGHT", "MAX_WIDTH", "MIN_WIDTH", "line_width", "load_line", "normalize", "pad"]

HEIGHT = 32
MIN_WIDTH = 16
MAX_WIDTH = 8192
_LYING = (5, 6, 7, 8)  # what EXIF calls pictures whose rows are its columns
_EPSILON = 0.01  # of the deviation: a blank line must not become a picture of its noise

Array = npt.NDArray[np.float32]


def load_line(image: str | Path | Image.Image | npt.NDArray[Any]) -> Array:
    """A file, a Pillow image, or an array ([H, W] or [H, W, 3], uint8 or floats in [0, 1]) as float32 [1, 32, W].

    Transparent pixels count as white, and a camera's note of which way is up is followed.

    Raises:
        DataError: it cannot be read, is empty, or is wider than 256 times its height.
    """
    name = str(image) if isinstance(image, str | Path) else "the image"
    grey = _grey(_open(image, name))
    width = _scaled_width(grey.size, name)
    if (width, HEIGHT) != grey.size:
        grey = grey.resize((width, HEIGHT), Image.Resampling.BILINEAR)
    return normalize(np.asarray(grey, np.float32) / np.float32(255))[None]


def line_width(path: Path) -> int:
    """How wide :func:`load_line` makes a file, without decoding it where its format says that at its beginning.

    Raises:
        DataError: as from :func:`load_line`, as far as that can be seen from the size.
    """
    with _reading(str(path)), Image.open(path) as opened:
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in _LYING
        size = opened.size[::-1] if turned else opened.size
    return _scaled_width(size, str(path))


def normalize(line: Array) -> Array:
    """Subtract the mean over all pixels and divide by their deviation."""
    result: Array = ((line - line.mean()) / (line.std() + _EPSILON)).astype(np.float32)
    return result


def pad(lines: Sequence[Array], multiple: int = 1, least: int = 0) -> Array:
    """Lines of several widths as one batch [N, 1, 32, W]: zeros on the right, W a multiple from ``least`` on."""
    width = -(-max(least, *(line.shape[-1] for line in lines)) // multiple) * multiple
    batch = np.zeros((len(lines), 1, HEIGHT, width), np.float32)
    for target, line in zip(batch, lines, strict=True):
        target[:, :, : line.shape[-1]] = line
    return batch


def _open(image: str | Path | Image.Image | npt.NDArray[Any], name: str) -> Image.Image:
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    elif not isinstance(image, Image.Image):
        with _reading(name), Image.open(image) as opened:
            image = ImageOps.exif_transpose(opened)
    if 0 in image.size:
        raise DataError(f"{name}: is empty ({image.width} x {image.height}); give a picture of a text line")
    return image


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "no image that Pillow can decode"
        raise DataError(f"{name}: cannot be read ({reason}); give a PNG, JPEG or similar file") from error


def _scaled_width(size: tuple[int, int], name: str) -> int:
    width = max(MIN_WIDTH, round(size[0] * HEIGHT / size[1]))
    if width > MAX_WIDTH:
        raise DataError(
            f"{name}: is {size[0]} x {size[1]} pixels, more than {MAX_WIDTH // HEIGHT} times as wide as high; "
            "cut it into shorter lines"
        )
    return width


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise DataError(f"an image array has the shape {list(array.shape)}; it must be [H, W] or [H, W, 3]")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
            raise DataError(f"an image array of {array.dtype} must be uint8, or finite floats in [0, 1]")
        array = (np.clip(array, 0, 1) * 255).round().astype(np.uint8)
    if 0 in array.shape:
        raise DataError(f"an image array has the shape {list(array.shape)}, which is empty; give a picture of a line")
    return Image.fromarray(array)


def _grey(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips these at 255 when it converts them; 16-bit scans need their whole range.
        values = np.asarray(image, np.float32)
        low, high = values.min(), values.max()
        return Image.fromarray(((values - low) / max(float(high - low), 1e-6) * 255).astype(np.uint8))
    return image.convert("L")
