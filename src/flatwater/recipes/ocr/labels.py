"""Characters as classes, and back: connectionist temporal classification, read greedily.

Class 0 is the blank; class i + 1 is the i-th character of the alphabet (Graves et al., Connectionist Temporal
Classification, ICML 2006).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flatwater.errors import DataError

__all__ = ["BLANK", "Alphabet"]

BLANK = 0


class Alphabet:
    """The characters a model knows, in the order of its classes.

    Raises:
        DataError: there are none, or one twice.
    """

    def __init__(self, characters: str) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise DataError(f"alphabet {characters[:20]!r} must be distinct characters, at least one")
        self.characters = characters
        self._classes = {character: index + 1 for index, character in enumerate(characters)}

    def __len__(self) -> int:
        """The number of characters; a model has one class more, the blank."""
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """The classes of a text.

        Raises:
            DataError: a character is not in the alphabet.
        """
        unknown = [character for character in text if character not in self._classes]
        if unknown:
            raise DataError(f"text {text!r} holds {unknown[0]!r}, which the alphabet lacks; leave the line out")
        return [self._classes[character] for character in text]

    def decode(self, logits: npt.NDArray[Any]) -> tuple[str, float]:
        """The most likely class of each step, repeats merged, blanks dropped.

        Args:
            logits: (T, classes), before softmax.

        Returns:
            The text, and a confidence in [0, 1]: the geometric mean, over the characters read, of the
            probability at which each was surest (over all steps where nothing was read).
        """
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        best = logits.argmax(axis=1)
        log_probability = -np.log(np.exp(shifted).sum(axis=1))  # of the best class: its shifted logit is 0
        starts = np.flatnonzero(np.diff(best, prepend=-1))
        peaks = np.maximum.reduceat(log_probability, starts)
        read = best[starts] != BLANK
        text = "".join(self.characters[index - 1] for index in best[starts][read])
        return text, float(np.exp(peaks[read].mean() if read.any() else log_probability.mean()))
