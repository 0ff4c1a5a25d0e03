"""Rendering, batches and labelled images."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flatwater.errors import DataError
from flatwater.recipes.ocr import config, fonts
from flatwater.recipes.ocr.data import IGNORE, STRIDE, WIDTH_MULTIPLE, DataSource, read_label_list
from flatwater.recipes.ocr.labels import BLANK, Alphabet
from flatwater.recipes.ocr.preprocess import HEIGHT
from flatwater.recipes.ocr.render import render

SMALL = "data={characters: 60, max_length: 4, sizes: [21, 25], test_lines: 30}"
ALPHABET = Alphabet("中文行字")


@pytest.fixture(scope="module")
def source() -> DataSource:
    return DataSource(config.load(None, [SMALL, "train.batch_characters=40"]))


def write_images(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for number, text in enumerate(texts):
        pixels = generator.integers(0, 256, (40, 40 * len(text)), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    path = folder / "list.txt"
    path.write_text("".join(f"{number}.png\t{text}\n" for number, text in enumerate(texts)), encoding="utf-8")
    return path


def test_batches_depend_on_the_step_alone(source: DataSource) -> None:
    again = DataSource(config.load(None, [SMALL, "train.batch_characters=40"]))
    again.train_batch(9)
    for left, right in zip(source.train_batch(5), again.train_batch(5), strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(source.train_batch(5).labels, source.train_batch(6).labels)


def test_batches_are_what_they_say(source: DataSource) -> None:
    for step in range(8):
        batch = source.train_batch(step)
        count, channels, height, width = batch.images.shape
        assert (channels, height, width % WIDTH_MULTIPLE) == (1, HEIGHT, 0)
        assert batch.images.dtype == np.float32
        assert np.isfinite(batch.images).all()
        assert batch.alignment is not None
        assert batch.alignment.shape == (count, width // STRIDE)
        for line, labels, length, frames, classes in zip(
            batch.images, batch.labels, batch.label_lengths, batch.frames, batch.alignment, strict=True
        ):
            assert not line[:, :, frames * STRIDE :].any()
            # What alignment says, read as CTC reads it, is the text.
            known = classes[classes != IGNORE]
            runs = known[np.flatnonzero(np.diff(known, prepend=-1))]
            distinct = [c for i, c in enumerate(labels[:length]) if i == 0 or c != labels[i - 1]]
            spelled = runs[runs != BLANK]
            assert [c for i, c in enumerate(spelled) if i == 0 or c != spelled[i - 1]] == distinct
            assert frames >= length + sum(labels[1:length] == labels[: length - 1])


def test_test_sets_show_the_same_words_in_other_fonts(source: DataSource) -> None:
    seen, unseen = source.test_set(), source.test_set(unseen_font=True)
    assert [sample.text for sample in seen] == [sample.text for sample in unseen]
    assert {sample.font for sample in seen} == {"NotoSansSC-Regular", "NotoSerifSC-Regular"}
    assert {sample.font for sample in unseen} == {"wqy-microhei"}
    assert seen[0].image().shape[:2] == (1, HEIGHT)
    np.testing.assert_array_equal(seen[3].picture, source.test_set()[3].picture)


def test_ink_stands_where_the_centres_say() -> None:
    font = fonts.Font(fonts.training_fonts()[0], ALPHABET.characters)
    lines = render(["中文行字"] * 20, ALPHABET, [font], [24], np.random.default_rng(0))
    for pixels, width, centres in zip(lines.pixels, lines.widths, lines.centres, strict=True):
        ink = np.abs(pixels[:, :width] - np.median(pixels[:, :width])).mean(axis=0)
        gaps = [(a + b) / 2 for a, b in itertools.pairwise(centres)]
        at_centres = np.mean([ink[round(c) - 3 : round(c) + 4].mean() for c in centres])
        at_gaps = np.mean([ink[round(g) - 1 : round(g) + 2].mean() for g in gaps])
        assert at_centres > at_gaps
        assert 0 <= pixels.min() <= pixels.max() <= 1


def test_a_font_that_lacks_a_glyph_is_named() -> None:
    with pytest.raises(DataError, match=r"NotoSansSC-Regular\.otf: lacks 2 of the 3 characters \(ሀꓘ\)") as caught:
        fonts.Font(fonts.training_fonts()[0], "中ሀꓘ")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_fonts_are_named(tmp_path: Path) -> None:
    path = tmp_path / "font.ttf"
    with pytest.raises(DataError, match=r"font\.ttf: no such file"):
        fonts.Font(path, "中")
    path.write_bytes(b"no font")
    with pytest.raises(DataError, match=r"font\.ttf: no font that FreeType can read"):
        fonts.Font(path, "中")


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match=r"package flatwater_no_such.*pip install"):
        fonts.packaged_file("flatwater_no_such", "font.ttf")


def test_fonts_of_ones_own() -> None:
    settings = config.load(None, [SMALL, f"data.fonts=['{fonts.unseen_font()}']"])
    assert {sample.font for sample in DataSource(settings).test_set()} == {"wqy-microhei"}


def test_labelled_images_alone(tmp_path: Path) -> None:
    path = write_images(tmp_path / "lines", ["的一", "是了我", "的", "Q"])
    settings = config.load(
        None, [SMALL, "data.fonts=[]", f"data.labels={path}", f"data.test_labels={path}", "data.extra_characters=Q"]
    )
    source = DataSource(settings)
    batch = source.train_batch(0)
    assert batch.alignment is None
    assert sorted(batch.label_lengths.tolist()) == [1, 1, 2, 3]
    assert not source.has_unseen_font
    assert [sample.text for sample in source.test_set()] == ["的一", "是了我", "的", "Q"]
    with pytest.raises(DataError, match="unseen font"):
        source.test_set(unseen_font=True)


def test_labelled_images_beside_rendered_ones(tmp_path: Path) -> None:
    path = write_images(tmp_path / "lines", ["的一", "是了我"])
    source = DataSource(config.load(None, [SMALL, f"data.labels={path}", "data.labels_share=0.5"]))
    labelled = [source.train_batch(step).alignment is None for step in range(40)]
    assert 8 <= sum(labelled) <= 32  # 20 expected, deviation 3.2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0.png 中文", r"line 2: '0\.png 中文' is not path<TAB>text"),
        ("0.png\t", "line 2"),
        ("0.png\t中\t文", "line 2"),
        ("absent.png\t中", r"line 2: there is no image .*absent\.png"),
        ("0.png\t中X", r"line 2: the character 'X' of '中X'"),
    ],
)
def test_lists_that_are_wrong(tmp_path: Path, line: str, expected: str) -> None:
    path = write_images(tmp_path, ["中文"])
    path.write_text(f"0.png\t中文\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"list\.txt, {expected}") as caught:
        read_label_list(path, ALPHABET)
    assert "\n" not in str(caught.value)


def test_lists_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    with pytest.raises(DataError, match="cannot be read"):
        read_label_list(path, ALPHABET)
    path.write_text("\n\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no lines"):
        read_label_list(path, ALPHABET)


def test_a_label_longer_than_its_image_is_named(tmp_path: Path) -> None:
    path = write_images(tmp_path, ["中"])
    path.write_text("0.png\t中中中中中\n", encoding="utf-8")
    settings = config.load(None, [SMALL, "data.fonts=[]", f"data.labels={path}", f"data.test_labels={path}"])
    with pytest.raises(DataError, match=r"0\.png: is too narrow for its 5 characters \(8 frames, 9 needed\)"):
        DataSource(settings).train_batch(0)


def test_an_unseen_font_is_looked_at_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.ttf: no such file"):
        DataSource(config.load(None, [SMALL, f"data.unseen_font={tmp_path / 'absent.ttf'}"]))
