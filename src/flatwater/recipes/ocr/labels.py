"""Texts as class numbers and back: the alphabet, and greedy CTC decoding. NumPy only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flatwater.errors import DataError

__all__ = ["BLANK", "Alphabet", "Reading", "edit_distance"]

BLANK = 0
"""The class of CTC's blank. ``alphabet[i]`` is class ``i + 1``."""


class Reading(NamedTuple):
    """A decoded line.

    ``confidence`` is the mean, over its characters, of the probability each was read with; for an empty line that
    of the blank, over its frames.
    """

    text: str
    confidence: float


class Alphabet:
    """The characters a recogniser knows, in the order of their classes.

    Raises:
        DataError: no characters, or one of them twice.
    """

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(characters)
        self._class_of = {character: number + 1 for number, character in enumerate(self.characters)}
        if not self.characters:
            raise DataError("the alphabet is empty; give at least one character")
        if len(self._class_of) != len(self.characters):
            twice = next(c for c in self.characters if self.characters.count(c) > 1)
            raise DataError(f"the alphabet holds {twice!r} twice; each character needs one class")

    def __len__(self) -> int:
        return len(self.characters)

    def __contains__(self, character: object) -> bool:
        return character in self._class_of

    @property
    def classes(self) -> int:
        """The characters and the blank."""
        return len(self.characters) + 1

    def encode(self, text: str) -> list[int]:
        """The classes of a text.

        Raises:
            DataError: a character is not in the alphabet.
        """
        try:
            return [self._class_of[character] for character in text]
        except KeyError as error:
            raise DataError(
                f"the character {error.args[0]!r} of {text!r} is not in the alphabet of {len(self)}; "
                "add it to data.extra_characters, or raise data.characters"
            ) from error

    def decode(self, logits: npt.NDArray[np.floating[Any]]) -> Reading:
        """Greedy CTC: the best class of each frame, repetitions merged, blanks dropped.

        Args:
            logits: [T, classes], before softmax.
        """
        if not len(logits):
            return Reading("", 0.0)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        probability = 1 / np.exp(shifted).sum(axis=-1)
        best = logits.argmax(axis=-1)
        starts = np.flatnonzero(np.diff(best, prepend=-1))
        highest = np.maximum.reduceat(probability, starts)
        classes = best[starts]
        characters = classes != BLANK
        text = "".join(self.characters[number - 1] for number in classes[characters])
        return Reading(text, float((highest[characters] if text else probability).mean()))


def edit_distance(read: str, truth: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements that make one text of the other."""
    row = list(range(len(truth) + 1))
    for i, left in enumerate(read, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(truth, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]
