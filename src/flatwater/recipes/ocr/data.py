"""Batches to train on and lines to test on.

The batch of a step depends on the configuration, its seed and the step alone. There is no iterator whose state a
checkpoint would have to hold, and no order in which batches must be asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flatwater.errors import DataError
from flatwater.recipes.ocr import corpus as corpora
from flatwater.recipes.ocr import fonts as font_files
from flatwater.recipes.ocr.config import Config
from flatwater.recipes.ocr.fonts import Font
from flatwater.recipes.ocr.labels import BLANK, Alphabet
from flatwater.recipes.ocr.preprocess import line_width, load_line, normalize, pad
from flatwater.recipes.ocr.render import Rendered, render

__all__ = ["IGNORE", "STRIDE", "WIDTH_MULTIPLE", "Batch", "DataSource", "Sample", "read_label_list"]

STRIDE = 4
"""Columns of the image for each frame of the recogniser's output."""
WIDTH_MULTIPLE = 16
"""Of the widths of batches: few different shapes, so that the framework can reuse what it prepared for them."""
IGNORE = -1
"""A frame that says nothing about alignment: the edge between a character and the gap."""

Array = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]


class Batch(NamedTuple):
    """Lines to learn from.

    ``images`` float32 [N, 1, 32, W], zeros right of each line; ``frames`` int64 [N], how many output frames belong
    to each; ``labels`` int32 [N, L], padded with 0; ``label_lengths`` int64 [N]; ``alignment`` int64 [N, W / 4],
    the class of each frame where rendering knows it (IGNORE where it does not), or None for labelled images. A rank's
    share has N lines of ``whole``, and is as wide as they all are together: norms see the padding, too.
    """

    images: Array
    frames: npt.NDArray[np.int64]
    labels: Integers
    label_lengths: npt.NDArray[np.int64]
    alignment: npt.NDArray[np.int64] | None
    whole: int


@dataclass(frozen=True)
class Sample:
    """A line to test on: its text, the picture (uint8 [H, W], or a file), and where it comes from."""

    text: str
    picture: npt.NDArray[np.uint8] | Path
    font: str | None = None

    def image(self) -> Array:
        """As the recogniser takes it, float32 [1, 32, W]."""
        return load_line(self.picture)


class DataSource:
    """Everything a run trains and tests on.

    Raises:
        DataError: a font, word list or label list cannot be used; all are looked at here, before training.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._data = config.data
        self.corpus = corpora.load(config.data)
        self.alphabet = self.corpus.alphabet
        paths = font_files.training_fonts() if self._data.fonts is None else self._data.fonts
        # Rendered words hold the corpus's characters only; extra ones come with labelled images.
        self._drawn = Alphabet(sorted({*self.corpus.training.characters, *self.corpus.testing.characters}))
        self._fonts = [Font(path, self._drawn.characters) for path in paths]
        self._labelled = [] if self._data.labels is None else read_label_list(self._data.labels, self.alphabet)
        self._test_labelled = (
            None if self._data.test_labels is None else read_label_list(self._data.test_labels, self.alphabet)
        )
        self._widths: dict[Path, int] = {}
        self._rendered_tests: dict[bool, list[Sample]] = {}  # by unseen_font; training and the job both ask
        self._unseen_fonts = []
        if self._test_labelled is None:
            path = self._data.unseen_font or font_files.unseen_font()
            self._unseen_fonts.append(Font(path, self._drawn.characters))

    @property
    def has_unseen_font(self) -> bool:
        """Whether there is a second test set."""
        return self._test_labelled is None

    def train_batch(self, step: int, *, rank: int = 0, ranks: int = 1) -> Batch:
        """The batch of a step, counted from 0; of several ranks, one's share of it: every ``ranks``-th line.

        A rank renders and reads its own lines. The others' it knows by what is random about them, and by their widths.

        Raises:
            DataError: there are fewer lines than ranks, or an image cannot be used.
        """
        generator = np.random.default_rng([self._config.seed, 0, step])
        chosen = slice(rank, None, ranks)
        if self._labelled and (not self._fonts or generator.random() < self._data.labels_share):
            return self._labelled_batch(generator, chosen, ranks)
        return self._rendered_batch(generator, chosen)

    def test_set(self, unseen_font: bool = False) -> list[Sample]:
        """Lines of held-out words, in the fonts of training or all in the unseen one; or the user's test list.

        Both sets show the same texts.

        Raises:
            DataError: ``unseen_font`` where the test set is a list of labelled images.
        """
        if self._test_labelled is not None:
            if unseen_font:
                raise DataError("data.test_labels replaces rendered test lines, so none can show an unseen font")
            return self._test_labelled
        if unseen_font not in self._rendered_tests:
            self._rendered_tests[unseen_font] = self._render_test_set(unseen_font)
        return self._rendered_tests[unseen_font]

    def _render_test_set(self, unseen_font: bool) -> list[Sample]:
        data = self._data
        texts = self.corpus.test_lines(data.test_lines, data.max_length, self._config.seed)
        fonts = self._unseen_fonts if unseen_font else self._fonts
        generator = np.random.default_rng([self._config.seed, 2, int(unseen_font)])
        samples = []
        for text in texts:
            line = render([text], self._drawn, fonts, data.sizes, generator)
            pixels = (line.pixels[0] * 255).round().astype(np.uint8)
            samples.append(Sample(text, pixels, line.fonts[0]))
        return samples

    def _rendered_batch(self, generator: np.random.Generator, chosen: slice) -> Batch:
        longest = int(generator.integers(self._data.min_length, self._data.max_length + 1))
        count = self._config.batch_lines(longest)
        texts = [self.corpus.training_line(generator, longest) for _ in range(count)]
        lines = render(texts, self._drawn, self._fonts, self._data.sizes, generator, WIDTH_MULTIPLE, chosen)
        images = [normalize(pixels[:, :width])[None] for pixels, width in zip(lines.pixels, lines.widths, strict=True)]
        encoded = [self.alphabet.encode(text) for text in texts]
        alignment = _align(lines, encoded[chosen])
        return _batch(pad(images, least=lines.pixels.shape[-1]), lines.widths, encoded, chosen, alignment)

    def _labelled_batch(self, generator: np.random.Generator, chosen: slice, ranks: int) -> Batch:
        count = min(len(self._labelled), self._config.smallest_batch)
        if count < ranks:
            raise DataError(
                f"data.labels makes batches of {count} lines, too few for {ranks} ranks; "
                "give more lines, or start fewer ranks"
            )
        samples = [self._labelled[i] for i in generator.choice(len(self._labelled), count, replace=False)]
        lines = {index: samples[index].image() for index in range(count)[chosen]}
        widths = [
            lines[index].shape[-1] if index in lines else self._width(sample) for index, sample in enumerate(samples)
        ]
        encoded = [self.alphabet.encode(sample.text) for sample in samples]
        for sample, width, classes in zip(samples, widths, encoded, strict=True):
            _check_fits(sample, width, classes)
        images = pad([*lines.values()], WIDTH_MULTIPLE, least=max(widths))
        return _batch(images, np.array(widths[chosen], np.int64), encoded, chosen, None)

    def _width(self, sample: Sample) -> int:
        """How wide a labelled line is, which another rank reads."""
        assert isinstance(sample.picture, Path)  # as read_label_list makes them
        if sample.picture not in self._widths:
            self._widths[sample.picture] = line_width(sample.picture)
        return self._widths[sample.picture]


def read_label_list(path: Path, alphabet: Alphabet) -> list[Sample]:
    """A list of line images in PaddleOCR's format: ``path<TAB>text`` a line, paths from the list's folder.

    Raises:
        DataError: the list cannot be read or is empty, a line of it is malformed, an image is not there, or a
            text holds a character that the alphabet lacks.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a list of path<TAB>text") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text; give a list of path<TAB>text") from error
    samples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, tab, text = line.partition("\t")
        if not tab or not name or not text or "\t" in text:
            raise DataError(f"{path}, line {number}: {line[:60]!r} is not path<TAB>text; correct or delete it")
        picture = path.parent / name
        if not picture.is_file():
            raise DataError(f"{path}, line {number}: there is no image {picture}; correct or delete the line")
        try:
            alphabet.encode(text)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        samples.append(Sample(text, picture))
    if not samples:
        raise DataError(f"{path}: holds no lines; give a list of path<TAB>text")
    return samples


def _batch(
    images: Array,
    widths: npt.NDArray[np.int64],
    encoded: Sequence[list[int]],
    chosen: slice,
    alignment: npt.NDArray[np.int64] | None,
) -> Batch:
    """The chosen lines as a batch; all but ``encoded`` are theirs alone."""
    lengths = np.array([len(line) for line in encoded], np.int64)
    labels = np.zeros((len(encoded), int(lengths.max())), np.int32)
    for row, line in zip(labels, encoded, strict=True):
        row[: len(line)] = line
    return Batch(images, -(-widths // STRIDE), labels[chosen], lengths[chosen], alignment, len(encoded))


def _check_fits(sample: Sample, width: int, classes: Sequence[int]) -> None:
    """CTC needs a frame for each character, and one more between two that are the same."""
    needed = len(classes) + sum(left == right for left, right in itertools.pairwise(classes))
    frames = -(-width // STRIDE)
    if frames < needed:
        raise DataError(
            f"{sample.picture}: is too narrow for its {len(classes)} characters ({frames} frames, {needed} needed); "
            "correct its label, or leave it out"
        )


def _align(lines: Rendered, encoded: Sequence[list[int]]) -> npt.NDArray[np.int64]:
    """The class of each frame: a character near its middle, blank in gaps and margins, IGNORE between the two."""
    count, _, width = lines.pixels.shape
    target = np.full((count, -(-width // STRIDE)), BLANK, np.int64)
    middles = np.arange(target.shape[1]) * STRIDE + (STRIDE - 1) / 2
    for row, centres, advances, classes in zip(target, lines.centres, lines.advances, encoded, strict=True):
        for centre, advance, number in zip(centres, advances, classes, strict=True):
            distance = np.abs(middles - centre)
            row[distance < max(STRIDE, 0.32 * advance)] = IGNORE
            row[distance <= max(STRIDE / 2, 0.16 * advance)] = number
    return target
