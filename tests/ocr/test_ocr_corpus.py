"""What lines are made of: held-out words stay held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flatwater.errors import DataError
from flatwater.recipes.ocr import corpus
from flatwater.recipes.ocr.config import DataConfig


@pytest.fixture(scope="module")
def default() -> corpus.Corpus:
    return corpus.load(DataConfig())


def test_no_training_line_shows_a_held_out_word(default: corpus.Corpus) -> None:
    generator = np.random.default_rng(0)
    for longest in range(2, 9):
        for _ in range(300):
            line = default.training_line(generator, longest)
            assert 2 <= len(line) <= longest
            parts = {line[i:j] for i in range(len(line)) for j in range(i + 2, len(line) + 1)}
            assert not parts & default.held_out


def test_test_lines_cover_a_thousand_characters(default: corpus.Corpus) -> None:
    lines = default.test_lines(2000, 8, seed=0)
    assert len(set(lines)) == 2000
    assert {len(line) for line in lines} == set(range(2, 9))
    assert len(set("".join(lines))) >= 1000
    assert lines == default.test_lines(2000, 8, seed=0)
    assert lines != default.test_lines(2000, 8, seed=1)


def test_test_lines_are_made_of_held_out_words(default: corpus.Corpus) -> None:
    def splits(text: str) -> bool:
        return not text or any(text[:end] in default.held_out and splits(text[end:]) for end in range(2, len(text) + 1))

    assert all(splits(line) for line in default.test_lines(300, 8, seed=0))


def test_about_the_given_share_is_held_out(default: corpus.Corpus) -> None:
    words = [f"{a}{b}" for a in default.alphabet.characters[:100] for b in default.alphabet.characters[:100]]
    share = np.mean([corpus.is_held_out(word, 0.1) for word in words])
    # A hash is as good as a coin: 10,000 throws, deviation 0.003.
    assert share == pytest.approx(0.1, abs=0.015)
    assert not any(corpus.is_held_out(character, 1.0) for character in default.alphabet.characters)


def test_a_list_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    words = [f"{a}{b}" for a in "甲乙丙丁" for b in "子丑寅卯"]
    path.write_text("".join(f"{word} {n}\n" for n, word in enumerate(words)) + "\n甲 900\n", encoding="utf-8")
    loaded = corpus.load(DataConfig(words=path, characters=8, extra_characters="甲0x", held_out=0.3))
    assert loaded.alphabet.characters[0] == "甲"
    assert loaded.alphabet.characters[8:] == "0x"
    assert 0 < len(loaded.held_out) < 16
    assert all(
        word not in loaded.held_out for word in (loaded.training.draw(np.random.default_rng(n), 8) for n in range(50))
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("中文 3\n行\n", r"words\.txt, line 2: '行' is not 'word frequency'"),
        ("中文 three\n", "line 1"),
        ("中文 3\n", "holds 2 characters, not 1150; lower data.characters"),
        (None, r"words\.txt: cannot be read \(No such file"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, content: str | None, expected: str) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=expected):
        corpus.load(DataConfig(words=path))


def test_too_many_test_lines_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("".join(f"{a}{b} 1\n" for a in "甲乙丙丁" for b in "子丑寅卯"), encoding="utf-8")
    loaded = corpus.load(DataConfig(words=path, characters=8, held_out=0.3))
    with pytest.raises(DataError, match=r"different lines, not 2000; lower data\.test_lines"):
        loaded.test_lines(2000, 2, seed=0)
