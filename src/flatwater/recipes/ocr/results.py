"""What a run leaves in its folder, file by file: the schemas that the job writes and the report reads.

==================  ==================================================================================
file                content
==================  ==================================================================================
config.yaml         the effective configuration
metrics.json        :class:`Metrics`
history.json        :class:`History`
norms.json          :class:`Norms`, the record of :class:`flatwater.paddle.monitor.NormMonitor`
fold.json           :class:`Fold`
verification.json   :class:`Verification`
samples/            line images (PNG) and samples.json, a list of :class:`Sample`
model/              the exported model, see :mod:`flatwater.recipes.ocr.read`
checkpoint/         where training goes on
report.html         all of it, to look at
==================  ==================================================================================

Keys that are not named here are allowed in each file and ignored, so that a newer run stays readable.
Shares (accuracies, confidences) lie in [0, 1].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from flatwater.errors import DataError
from flatwater.files import write_whole
from flatwater.recipes.ocr.config import Config

__all__ = [
    "Batch",
    "Distribution",
    "Evaluation",
    "Fold",
    "FoldedPair",
    "History",
    "LayerNorms",
    "LeftNorm",
    "Metrics",
    "NormSample",
    "Norms",
    "Sample",
    "TrainPoint",
    "Verification",
    "VerificationRow",
    "load",
    "save",
]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Batch(_Record):
    """What a step of training takes: the effective batch, on all ranks together."""

    ranks: int
    characters: int
    lines: tuple[int, int]
    """The fewest, and the most."""

    @classmethod
    def of(cls, config: Config, ranks: int) -> Batch:
        """That of a training with this configuration on so many ranks."""
        lines = (config.smallest_batch, config.batch_lines(config.data.min_length))
        return cls(ranks=ranks, characters=config.train.batch_characters, lines=lines)

    def __str__(self) -> str:
        fewest, most = self.lines
        lines = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        if self.ranks == 1:
            return f"batch: {lines} lines, {self.characters} characters"
        share = f"{fewest / self.ranks:g}" if fewest == most else f"{fewest / self.ranks:g} to {most / self.ranks:g}"
        return (
            f"effective batch: {lines} lines, {self.characters} characters, on {self.ranks} ranks ({share} lines each)"
        )


class Metrics(_Record):
    """metrics.json: how good the model is and what it took.

    ``char_accuracy`` is 1 - (edit distance summed over all lines) / (characters of all lines), on lines of
    held-out words in the fonts of training; ``line_accuracy`` is the share of lines read without a mistake.
    """

    char_accuracy: float
    char_accuracy_unseen_font: float | None = None
    line_accuracy: float | None = None
    line_accuracy_unseen_font: float | None = None
    test_lines: int | None = None
    distinct_characters: int | None = None
    lines_per_second: float | None = None
    """Of training; the report takes the median of history.json where this is not given."""
    batch: Batch | None = None
    seconds: dict[str, float] = {}
    """Wall time by phase of the job, in its order; ``total``, if given, is the whole of it."""
    environment: dict[str, Any] = {}
    """Versions, processor, threads and the like, as the reader should see them."""


class TrainPoint(_Record):
    """A moment of training; loss is the mean since the point before."""

    step: int
    loss: float
    lr: float | None = None
    lines_per_second: float | None = None


class Evaluation(_Record):
    """Accuracy after ``step`` steps, on the test lines or a part of them."""

    step: int
    char_accuracy: float
    char_accuracy_unseen_font: float | None = None


class History(_Record):
    """history.json: training over time, ascending in step."""

    train: list[TrainPoint] = []
    evaluations: list[Evaluation] = []


class Distribution(_Record):
    """See :mod:`flatwater.paddle.monitor`, as for the three classes below."""

    count: int
    non_finite: int
    mean: float | None
    std: float | None
    quantiles: list[float | None]
    low: float | None
    high: float | None
    counts: list[int]


class NormSample(_Record):
    """One layer at one step."""

    step: int
    statistics: str
    before: Distribution
    after: Distribution
    running_mean: list[float | None] | None
    running_variance: list[float | None] | None


class LayerNorms(_Record):
    """One layer over time."""

    path: str
    kind: str
    channels: int
    samples: list[NormSample]


class Norms(_Record):
    """norms.json."""

    quantile_levels: list[float]
    layers: list[LayerNorms]
    unobserved: dict[str, str] = {}


class FoldedPair(_Record):
    """A norm that went into a convolution."""

    conv: str
    norm: str


class LeftNorm(_Record):
    """A norm that stayed, and why."""

    norm: str
    reason: str


class Fold(_Record):
    """fold.json: what folding did, and how far it moved the model's output on example inputs."""

    folded: list[FoldedPair] = []
    left: list[LeftNorm] = []
    max_abs: float | None = None
    max_rel: float | None = None


class VerificationRow(_Record):
    """One exported form at one batch size, against the trained model."""

    form: str
    batch: int
    max_abs: float | None
    max_rel: float | None
    tolerance: float | None = None
    passed: bool
    note: str | None = None


class Verification(_Record):
    """verification.json."""

    passed: bool
    rows: list[VerificationRow]


class Sample(_Record):
    """An entry of samples/samples.json: a line image of the same folder, and what the exported model read."""

    file: str
    truth: str
    read: str
    confidence: float | None = None
    font: str | None = None

    @property
    def read_right(self) -> bool:
        """Whether every character was."""
        return self.truth == self.read


_T = TypeVar("_T")


def load(path: Path, schema: type[_T]) -> _T:
    """Read one of these files: ``load(folder / "metrics.json", Metrics)``.

    Raises:
        DataError: it is missing or does not hold what the schema says.
    """
    try:
        return TypeAdapter(schema).validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); the step of the job that writes it did not finish"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise DataError(f"{path}: {where}: {first['msg']}; run the job again to write it anew") from error


def save(path: Path, record: BaseModel | Sequence[BaseModel]) -> None:
    """Write one of these files whole or not at all."""
    plain = record.model_dump() if isinstance(record, BaseModel) else [one.model_dump() for one in record]
    write_whole(path, json.dumps(plain, ensure_ascii=False, indent=1) + "\n")
