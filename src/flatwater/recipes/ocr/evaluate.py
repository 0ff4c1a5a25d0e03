"""How well a recogniser reads: edit distance over a test set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import paddle

from flatwater.recipes.ocr.data import STRIDE, WIDTH_MULTIPLE, Sample
from flatwater.recipes.ocr.labels import Alphabet, Reading, edit_distance
from flatwater.recipes.ocr.preprocess import pad

__all__ = ["Evaluation", "Mistake", "evaluate", "read_samples"]


class Mistake(NamedTuple):
    """A line that was not read as it is written, by its number in the test set."""

    line: int
    truth: str
    read: str


class Evaluation(NamedTuple):
    """Accuracies in [0, 1]; ``distinct_characters`` are those of the test set's texts."""

    char_accuracy: float
    line_accuracy: float
    lines: int
    distinct_characters: int
    mistakes: list[Mistake]


def evaluate(
    model: paddle.nn.Layer, samples: Sequence[Sample], alphabet: Alphabet, *, batch_size: int = 50
) -> Evaluation:
    """Character accuracy ``1 - Σ edit distance / Σ length``, and the share of lines without a mistake.

    The model is in ``eval()`` mode meanwhile, and in the mode it came in afterwards.
    """
    readings = read_samples(model, samples, alphabet, batch_size=batch_size)
    mistakes = [
        Mistake(number, sample.text, reading.text)
        for number, (sample, reading) in enumerate(zip(samples, readings, strict=True))
        if sample.text != reading.text
    ]
    characters = sum(len(sample.text) for sample in samples)
    distance = sum(edit_distance(mistake.read, mistake.truth) for mistake in mistakes)
    return Evaluation(
        char_accuracy=1 - distance / characters,
        line_accuracy=1 - len(mistakes) / len(samples),
        lines=len(samples),
        distinct_characters=len({character for sample in samples for character in sample.text}),
        mistakes=mistakes,
    )


def read_samples(
    model: paddle.nn.Layer, samples: Sequence[Sample], alphabet: Alphabet, *, batch_size: int = 50
) -> list[Reading]:
    """What the model reads, in the order of the samples; lines of about the same width share a batch."""
    images = [sample.image() for sample in samples]
    by_width = sorted(range(len(images)), key=lambda number: images[number].shape[-1])
    readings: dict[int, Reading] = {}
    training = model.training
    model.eval()
    try:
        with paddle.no_grad():
            for start in range(0, len(by_width), batch_size):
                numbers = by_width[start : start + batch_size]
                lines = [images[number] for number in numbers]
                logits = model(paddle.to_tensor(pad(lines, WIDTH_MULTIPLE))).numpy()
                for number, line, frames in zip(numbers, lines, logits, strict=True):
                    readings[number] = alphabet.decode(frames[: -(-line.shape[-1] // STRIDE)])
    finally:
        if training:
            model.train()
    return [readings[number] for number in range(len(samples))]
