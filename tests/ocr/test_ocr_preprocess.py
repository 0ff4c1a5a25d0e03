"""Any image becomes the same kind of line, or one line of complaint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flatwater.errors import DataError
from flatwater.recipes.ocr.preprocess import HEIGHT, MIN_WIDTH, load_line, normalize, pad

PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, 100), dtype=np.uint8)


def test_a_line_of_the_right_height_is_only_normalized() -> None:
    line = load_line(PIXELS)
    assert (line.shape, line.dtype) == ((1, HEIGHT, 100), np.float32)
    np.testing.assert_array_equal(line[0], normalize(PIXELS.astype(np.float32) / 255))
    # float32 over 3200 values, and 0.01 added to a deviation of about 0.29
    assert abs(line.mean()) < 1e-5
    assert line.std() == pytest.approx(1, abs=0.05)


def test_files_images_and_arrays_agree(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    Image.fromarray(PIXELS).save(path)
    colour = np.repeat(PIXELS[:, :, None], 3, axis=2)
    for source in (path, str(path), Image.open(path), colour, PIXELS.astype(np.float32) / 255):
        np.testing.assert_array_equal(load_line(source), load_line(PIXELS))


@pytest.mark.parametrize(
    ("size", "width"), [((200, 64), 100), ((50, 16), 100), ((3, 32), MIN_WIDTH), ((7, 30), MIN_WIDTH)]
)
def test_the_aspect_is_kept(size: tuple[int, int], width: int) -> None:
    assert load_line(Image.new("L", size, 128)).shape == (1, HEIGHT, width)


def test_a_line_without_contrast_is_finite() -> None:
    np.testing.assert_array_equal(load_line(np.full((32, 40), 200, np.uint8)), np.zeros((1, 32, 40), np.float32))


def test_transparent_paper_is_white() -> None:
    ink = np.zeros((32, 64, 4), np.uint8)
    ink[8:24, 8:56, 3] = 255  # black where it is opaque; what is transparent is black too
    flat = np.full((32, 64), 255, np.uint8)
    flat[8:24, 8:56] = 0
    np.testing.assert_array_equal(load_line(Image.fromarray(ink)), load_line(flat))


def test_sixteen_bits_keep_their_range() -> None:
    deep = PIXELS.astype(np.uint16) * 257
    # Stretched to the whole range, then rounded down to 8 bits: one step of 255, over a deviation of 0.29.
    np.testing.assert_allclose(load_line(Image.fromarray(deep)), load_line(PIXELS), atol=0.03)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (np.zeros((0, 5), np.uint8), "empty"),
        (np.zeros((4, 5, 2), np.uint8), r"\[4, 5, 2\]"),
        (np.zeros((4, 5), np.int32), "int32"),
        (np.full((4, 5), np.nan, np.float32), "finite"),
        (Image.new("L", (32 * 300, 32)), "9600 x 32 pixels.*shorter lines"),
    ],
)
def test_images_that_are_none(source: np.ndarray | Image.Image, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load_line(source)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "line.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"line\.png: cannot be read") as caught:
        load_line(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    Image.fromarray(PIXELS).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"line\.png: cannot be read"):
        load_line(path)


def test_padding_is_zero_on_the_right() -> None:
    lines = [np.ones((1, HEIGHT, width), np.float32) for width in (5, 9)]
    batch = pad(lines, multiple=4)
    assert batch.shape == (2, 1, HEIGHT, 12)
    assert batch.sum(axis=(1, 2, 3)).tolist() == [5 * HEIGHT, 9 * HEIGHT]
    assert batch[0, 0, 0, :5].all()
