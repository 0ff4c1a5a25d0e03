"""Words: the alphabet they are written in, and which of them training never sees.

A line of text is a word or several in a row. Each word is drawn for a character: first a character, all alike,
then a word that holds it. Otherwise the rare ones of a thousand characters would hardly ever be seen.

A word is held out if a hash of it says so: the same words in every run, on every machine, and whatever the seed.
No line of training contains a held-out word, not even across two words.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flatwater.errors import DataError
from flatwater.recipes.ocr.config import DataConfig
from flatwater.recipes.ocr.fonts import packaged_file
from flatwater.recipes.ocr.labels import Alphabet

__all__ = ["Corpus", "Lexicon", "is_held_out", "load", "shows_held_out"]

_ATTEMPTS = 200


class Lexicon:
    """Words that can be drawn, by the characters they hold."""

    def __init__(self, words: Iterable[str]) -> None:
        by_character: dict[str, list[str]] = defaultdict(list)
        for word in words:
            for character in dict.fromkeys(word):
                by_character[character].append(word)
        self._by_character = dict(by_character)
        self.characters = sorted(self._by_character)

    def draw(self, generator: np.random.Generator, longest: int, character: str | None = None) -> str:
        """A word of at most ``longest`` characters that holds ``character``, or "" where a few tries find none."""
        if character is None:
            character = self.characters[generator.integers(len(self.characters))]
        words = self._by_character[character]
        for _ in range(4):
            word = words[generator.integers(len(words))]
            if len(word) <= longest:
                return word
        return ""


@dataclass(frozen=True)
class Corpus:
    """What lines are made of. ``held_out`` are the words of two or more characters that only tests show."""

    alphabet: Alphabet
    training: Lexicon
    testing: Lexicon
    held_out: frozenset[str]
    min_length: int

    def training_line(self, generator: np.random.Generator, longest: int) -> str:
        """A line of at most ``longest`` characters without any held-out word in it."""
        for _ in range(_ATTEMPTS):
            text = self.training.draw(generator, longest)
            while len(text) < longest and generator.random() < 0.85:
                text += self.training.draw(generator, longest - len(text))
            if len(text) >= self.min_length and not shows_held_out(text, self.held_out):
                return text
        raise DataError(
            f"found no line of {self.min_length} to {longest} characters in {_ATTEMPTS} tries; "
            "give more or shorter words, or lower data.held_out"
        )

    def test_lines(self, count: int, longest: int, seed: int) -> list[str]:
        """Different lines made of held-out words only, going round all characters that these hold."""
        generator = np.random.default_rng([seed, 1])
        lines: dict[str, None] = {}
        queue: list[str] = []
        for _ in range(20 * count):  # a line is used once, so a small list of words may not have enough
            if len(lines) == count:
                return list(lines)
            if not queue:
                queue = [str(character) for character in generator.permutation(self.testing.characters)]
            text = self.testing.draw(generator, longest, queue.pop())
            while len(text) < longest and generator.random() < 0.5:
                text += self.testing.draw(generator, longest - len(text))
            if len(text) >= self.min_length:
                lines[text] = None
        raise DataError(
            f"the held-out words make {len(lines)} different lines, not {count}; "
            "lower data.test_lines, or raise data.held_out"
        )


def is_held_out(word: str, share: float) -> bool:
    """Whether a word belongs to the ``share`` of all words that training never shows."""
    if len(word) < 2:
        return False
    number = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
    return number < share * 2**64


def shows_held_out(text: str, held_out: Set[str]) -> bool:
    """Whether any part of the text is a held-out word."""
    size = len(text)
    return any(text[i:j] in held_out for i in range(size - 1) for j in range(i + 2, size + 1))


def load(config: DataConfig) -> Corpus:
    """Read the word list and split it.

    Raises:
        DataError: it cannot be read, a line of it is malformed, or too few words are left.
    """
    path = config.words or packaged_file("jieba", "dict.txt")
    frequencies = _read(path)
    usage: Counter[str] = Counter()
    for word, frequency in frequencies.items():
        for character in word:
            usage[character] += frequency
    if len(usage) < config.characters:
        raise DataError(f"{path}: holds {len(usage)} characters, not {config.characters}; lower data.characters")
    # Ties by code point: the alphabet must not depend on the order of a file.
    frequent = [one for one, _ in sorted(usage.items(), key=lambda item: (-item[1], item[0]))[: config.characters]]
    alphabet = Alphabet(dict.fromkeys([*frequent, *config.extra_characters]))

    known = set(frequent)
    words = [word for word in frequencies if len(word) <= config.max_length and known.issuperset(word)]
    held_out = frozenset(word for word in words if is_held_out(word, config.held_out))
    training = [word for word in words if not shows_held_out(word, held_out)]
    if not training or not held_out:
        raise DataError(
            f"{path}: leaves {len(training)} words to train on and {len(held_out)} to test with; give more words"
        )
    return Corpus(alphabet, Lexicon(training), Lexicon(sorted(held_out)), held_out, config.min_length)


def _read(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a word list, see data.words") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text; a word list is 'word frequency' a line") from error
    frequencies: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) < 2 or not fields[1].isascii() or not fields[1].isdigit():
            raise DataError(f"{path}, line {number}: {line[:40]!r} is not 'word frequency'; correct or delete it")
        frequencies[fields[0]] = max(1, int(fields[1]))
    return frequencies
