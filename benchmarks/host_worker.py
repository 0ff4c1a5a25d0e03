"""Whole training steps of small networks, in a process of their own for each environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn

import flatwater.paddle as fw
from benchmarks.timing import timer
from benchmarks.worker import serve
from flatwater.recipes.ocr.config import ModelConfig, NormConfig
from flatwater.recipes.ocr.model import Recognizer

__all__ = ["MODELS", "TrainingStep"]

CLASSES = 100
LABELS = 6
"""Characters in each line for the recogniser."""


Made = tuple[nn.Layer, paddle.Tensor, paddle.Tensor]


def _classifier(make: Callable[..., nn.Layer]) -> Callable[[], Made]:
    def made() -> Made:
        return make(num_classes=CLASSES), paddle.randn([16, 3, 112, 112]), paddle.randint(0, CLASSES, [16])

    return made


def _recognizer() -> Made:
    model = Recognizer(ModelConfig(), NormConfig(), CLASSES)
    return model, paddle.randn([32, 1, 32, 192]), paddle.randint(1, CLASSES, [32, LABELS], "int32")


MODELS: dict[str, Callable[[], Made]] = {
    "ResNet-18 16x3x112x112": _classifier(paddle.vision.models.resnet18),
    "MobileNetV2 16x3x112x112": _classifier(paddle.vision.models.mobilenet_v2),
    "OCR recogniser 32x1x32x192": _recognizer,
}
"""Networks, with a batch of images and what should be read in them."""


class TrainingStep:
    """Forward, loss, backward, and a step of the optimizer.

    Args:
        model: one of :data:`MODELS`.
        convert: whether the norms are Flatwater's, or Paddle's own.
    """

    def __init__(self, model: str, *, convert: bool) -> None:
        paddle.seed(0)
        self.model, self.images, self.labels = MODELS[model]()
        fw.convert(self.model) if convert else _make_stock(self.model)
        self.model.train()
        self.optimizer = paddle.optimizer.Momentum(1e-4, 0.9, self.model.parameters())

    def __call__(self) -> None:
        self._loss(self.model(self.images)).backward()
        self.optimizer.step()
        self.optimizer.clear_grad()

    def _loss(self, logits: paddle.Tensor) -> paddle.Tensor:
        if logits.ndim == 2:
            return F.cross_entropy(logits, self.labels)
        samples, frames, _ = logits.shape
        lengths = (paddle.full([samples], length, "int64") for length in (frames, LABELS))
        return F.ctc_loss(logits.transpose([1, 0, 2]), self.labels, *lengths)


def _make_stock(model: nn.Layer) -> None:
    """Give the recogniser's blocks what a user of Paddle alone would write: a norm, and behind it an activation."""
    for block in model.sublayers():
        if isinstance(block, fw.ConvBNLayer):
            block.bn = nn.Sequential(nn.BatchNorm2D(block.conv.weight.shape[0]), nn.ReLU())


class Contenders:
    """The steps of the model that is being measured, by whose norm layers they have."""

    def __init__(self) -> None:
        self._steps: dict[str, TrainingStep] = {}

    def prepare(self, model: str) -> list[str]:
        """Make the steps for this model; returns their names."""
        self._steps = {name: TrainingStep(model, convert=name == "flatwater") for name in ("stock", "flatwater")}
        return list(self._steps)

    def time(self, contender: str, repeats: int) -> float:
        """Milliseconds of one step."""
        return timer(self._steps[contender])(repeats)


def models() -> list[Any]:
    """The names of all models."""
    return list(MODELS)


if __name__ == "__main__":
    contenders = Contenders()
    serve({"models": models, "prepare": contenders.prepare, "time": contenders.time})
