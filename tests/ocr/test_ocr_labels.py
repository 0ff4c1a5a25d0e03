"""Texts as classes, CTC decoding, edit distance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatwater.errors import DataError
from flatwater.recipes.ocr.labels import BLANK, Alphabet, edit_distance

ALPHABET = Alphabet("中文行字")
TEXTS = st.text(alphabet=ALPHABET.characters, max_size=8)


def logits_of(path: list[int], height: float = 5.0) -> np.ndarray:
    logits = np.zeros((len(path), ALPHABET.classes), np.float32)
    logits[np.arange(len(path)), path] = height
    return logits


@settings(max_examples=50, deadline=None)
@given(TEXTS, st.integers(1, 3), st.integers(1, 2))
def test_decoding_undoes_every_ctc_path(text: str, repeats: int, gap: int) -> None:
    path = [BLANK] * gap
    for number in ALPHABET.encode(text):
        path += [number] * repeats + [BLANK] * gap
    assert ALPHABET.decode(logits_of(path)).text == text


def test_a_repeated_character_needs_a_blank_between() -> None:
    assert ALPHABET.decode(logits_of([1, 1, 2])).text == "中文"
    assert ALPHABET.decode(logits_of([1, 0, 1, 2])).text == "中中文"


def test_confidence_is_the_mean_of_each_characters_best_frame() -> None:
    logits = logits_of([1, 1, 0, 2])
    logits[0] *= 0.1
    best = np.exp(5) / (np.exp(5) + ALPHABET.classes - 1)
    # Both characters have a frame of full height; float32 softmax of five classes, so a few ulp.
    assert ALPHABET.decode(logits).confidence == pytest.approx(best, rel=1e-6)
    assert ALPHABET.decode(logits_of([0, 0])) == ("", pytest.approx(best, rel=1e-6))
    assert ALPHABET.decode(np.zeros((0, ALPHABET.classes), np.float32)) == ("", 0.0)


def test_large_logits_do_not_overflow() -> None:
    assert ALPHABET.decode(logits_of([1, 0, 2], height=1e4)) == ("中文", 1.0)


def test_unknown_characters_are_named() -> None:
    with pytest.raises(DataError, match=r"'X' of '中X' is not in the alphabet of 4.*extra_characters"):
        ALPHABET.encode("中X")


@pytest.mark.parametrize(("characters", "expected"), [("", "empty"), ("中文中", "'中' twice")])
def test_alphabets_that_are_none(characters: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        Alphabet(characters)


def slow_distance(read: str, truth: str) -> int:
    """The definition, word for word."""
    if not read or not truth:
        return len(read) + len(truth)
    return min(
        slow_distance(read[1:], truth) + 1,
        slow_distance(read, truth[1:]) + 1,
        slow_distance(read[1:], truth[1:]) + (read[0] != truth[0]),
    )


@settings(max_examples=60, deadline=None)
@given(st.text("ab中", max_size=5), st.text("ab中", max_size=5))
def test_edit_distance_is_levenshteins(read: str, truth: str) -> None:
    assert edit_distance(read, truth) == slow_distance(read, truth)
