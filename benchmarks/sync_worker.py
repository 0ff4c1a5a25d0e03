"""What one rank does for :mod:`benchmarks.sync`: training steps under DataParallel, and sums alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import distributed, nn

import flatwater.paddle as fw
from benchmarks.timing import timer
from benchmarks.worker import serve
from flatwater.kernels import Statistics
from flatwater.paddle.kinds import BATCH_NORMS
from flatwater.paddle.sync.collectives import Communicator, Operation, communicator_of
from flatwater.paddle.sync.doubling import DoublingTransport, _Link
from flatwater.paddle.sync.transport import Pause
from flatwater.recipes.ocr.config import ModelConfig, NormConfig
from flatwater.recipes.ocr.model import Recognizer

__all__ = ["MODELS", "LateLinks", "Stopwatch", "TrainingStep"]

CLASSES = 10
LABELS = 4
"""Characters in each line for the recogniser."""

Made = tuple[nn.Layer, paddle.Tensor, paddle.Tensor]


def _classifier(make: Callable[..., nn.Layer]) -> Callable[[], Made]:
    def made() -> Made:
        return make(num_classes=CLASSES), paddle.randn([8, 3, 64, 64]), paddle.randint(0, CLASSES, [8])

    return made


def _recognizer() -> Made:
    model = Recognizer(ModelConfig(), NormConfig(), CLASSES)
    return model, paddle.randn([8, 1, 32, 128]), paddle.randint(1, CLASSES, [8, LABELS], "int32")


def _norms_alone() -> Made:
    layers: list[nn.Layer] = [nn.Conv2D(3, 64, 1)]
    layers += [nn.BatchNorm2D(64) for _ in range(20)]
    return (
        nn.Sequential(*layers, nn.Flatten(1), nn.Linear(64 * 16, CLASSES)),
        paddle.randn([2, 3, 4, 4]),
        paddle.randint(0, CLASSES, [2]),
    )


MODELS: dict[str, Callable[[], Made]] = {
    "ResNet-18 8x3x64x64": _classifier(paddle.vision.models.resnet18),
    "MobileNetV2 8x3x64x64": _classifier(paddle.vision.models.mobilenet_v2),
    "OCR recogniser 8x1x32x128": _recognizer,
    "20 norms 2x64x4x4": _norms_alone,
}
"""Networks, with a rank's batch and what should be read in it. In the last, ranks compute next to nothing."""


class TrainingStep:
    """Forward, loss, backward with DataParallel's average, and a step of the optimizer.

    Args:
        model: one of :data:`MODELS`.
        convert: makes the norms what they are to be.
    """

    def __init__(self, model: str, convert: Callable[[nn.Layer], object]) -> None:
        paddle.seed(distributed.get_rank())
        network, self.images, self.labels = MODELS[model]()
        convert(network)
        self.channels = [int(layer._mean.shape[0]) for layer in network.sublayers() if isinstance(layer, BATCH_NORMS)]
        self.model = paddle.DataParallel(network)
        self.model.train()
        self.optimizer = paddle.optimizer.Momentum(1e-4, 0.9, network.parameters())

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


class Stopwatch:
    """When this rank came to each sum, and when it left it: what lies between two sums is its own work."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        wrapped, times = Communicator.sum, self.times

        def watched(self: Communicator, values: Statistics, operation: Operation, timeout: float) -> Statistics:
            came = time.perf_counter()
            total = wrapped(self, values, operation, timeout)
            times.append((came, time.perf_counter()))
            return total

        Communicator.sum = watched  # type: ignore[method-assign]

    def steps(self, count: int, sums: int) -> dict[str, Any]:
        """Milliseconds of the last ``count`` steps with so many sums each.

        Returns:
            ``in_sums``: a list with one number for each step. ``between``: for each step a list, from each sum but
            its last to the next.
        """
        times = np.array(self.times[-count * sums :]).reshape(count, sums, 2) * 1e3
        in_sums = (times[:, :, 1] - times[:, :, 0]).sum(1)
        return {"in_sums": in_sums.tolist(), "between": (times[:, 1:, 0] - times[:, :-1, 1]).tolist()}


class LateLinks:
    """What makes a message come later: whoever has received it sleeps before going on."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._slept: list[float] = []

    def link(self, link: _Link) -> _Link:
        """The same link, late from now on."""
        swap = link.swap

        def late(message: memoryview, into: memoryview, pause: Pause) -> None:
            swap(message, into, pause)
            if into:
                began = time.perf_counter()
                time.sleep(self._seconds)
                self._slept.append(time.perf_counter() - began)

        link.swap = late  # type: ignore[method-assign]
        return link

    def mean(self) -> float:
        """Seconds: the system wakes nobody on the dot."""
        return float(np.mean(self._slept))


def _communicator() -> Communicator:
    return communicator_of(tuple(range(distributed.get_world_size())), None, paddle.CPUPlace())


def _sum_of(length: int) -> Callable[[], object]:
    communicator, values = _communicator(), np.ones(length)
    operation = Operation("benchmark", "forward", length)
    return lambda: communicator.sum(values, operation, 60.0)


class Contenders:
    """What takes its turns in this rank: steps of one model, or sums of one length."""

    def __init__(self) -> None:
        self._steps: dict[str, Callable[[], object]] = {}
        self._sums: dict[str, int] = {}

    def start(self) -> None:
        """Join the world."""
        distributed.init_parallel_env()
        self._stopwatch = Stopwatch()

    def prepare(self, model: str) -> list[int]:
        """Make the steps for this model, ``batch`` and ``sync``; returns the channels of its norms."""
        batch, sync = TrainingStep(model, fw.convert), TrainingStep(model, fw.convert_sync_batchnorm)
        self._steps = {"batch": batch, "sync": sync}
        self._sums = {"batch": 0, "sync": 2 * len(sync.channels)}
        return sync.channels

    def prepare_sums(self, length: int) -> None:
        """Make sums of ``length`` float64 values: ``flatwater``'s with all its checks, and ``paddle``'s."""
        tensor = paddle.zeros([length], "float64")
        self._steps = {"flatwater": _sum_of(length), "paddle": lambda: distributed.all_reduce(tensor)}
        self._sums = dict.fromkeys(self._steps, 0)

    def prepare_late_sums(self, length: int, seconds: float) -> None:
        """Make ``late``: such a sum of ours, in which each message comes so many seconds later, as over a network."""
        add = _sum_of(length)
        add()  # connects
        transport = _communicator()._transport
        assert isinstance(transport, DoublingTransport)
        late = LateLinks(seconds)
        transport._links = {partner: late.link(link) for partner, link in transport._links.items()}
        self._steps, self._sums, self._late = {"late": add}, {"late": 0}, late

    def time(self, contender: str, repeats: int) -> dict[str, Any]:
        """Milliseconds of one step or sum, and of steps with sums what :meth:`Stopwatch.steps` knows."""
        found: dict[str, Any] = {"milliseconds": timer(self._steps[contender])(repeats)}
        if sums := self._sums[contender]:
            found |= self._stopwatch.steps(repeats, sums)
        self._stopwatch.times.clear()
        return found

    def delay(self) -> float:
        """Milliseconds by which the messages of ``late`` really came later."""
        return self._late.mean() * 1e3


def models() -> list[str]:
    """The names of all models."""
    return list(MODELS)


if __name__ == "__main__":
    contenders = Contenders()
    serve(
        {
            "start": contenders.start,
            "models": models,
            "prepare": contenders.prepare,
            "prepare_sums": contenders.prepare_sums,
            "prepare_late_sums": contenders.prepare_late_sums,
            "delay": contenders.delay,
            "time": contenders.time,
        }
    )
