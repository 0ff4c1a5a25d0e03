"""Training: a plain loop over steps, so that going on from a checkpoint gives the very same numbers.

``paddle.Model.fit`` counts epochs over a loader and shuffles with the process's random state, and cannot begin in
the middle of an epoch; exact resumption would mean working around each of these. Here a step's batch and learning
rate are functions of the step, and the loop holds nothing else than the model, the optimizer and the history.

**The loss.** CTC (Graves et al., 2006) learns from the text alone, and for a thousand classes spends most of a
short training finding out where in the picture each character is. Rendering knows that. So over the first
``train.alignment`` share of the steps the loss moves from one to the other:

    loss = p · CE(logits, class of each frame) + (1 - p) · CTC(logits, text),   p from 1 to 0, linearly

and is CTC alone from there on, as it is throughout for labelled images, which know no positions. The loss in the
history is CTC's, over the length of each text, at every step.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import paddle
import paddle.nn.functional as F
from rich.console import Console

from flatwater.errors import CheckpointError, ConfigError, FlatwaterError
from flatwater.recipes.ocr import checkpoint as checkpoints
from flatwater.recipes.ocr.config import Config, OptimizerConfig
from flatwater.recipes.ocr.data import IGNORE, Batch, DataSource, Sample
from flatwater.recipes.ocr.evaluate import evaluate
from flatwater.recipes.ocr.interruption import interruption
from flatwater.recipes.ocr.labels import BLANK
from flatwater.recipes.ocr.model import Recognizer, build
from flatwater.recipes.ocr.progress import Progress
from flatwater.recipes.ocr.ranks import World
from flatwater.recipes.ocr.results import Evaluation, History, TrainPoint

__all__ = ["CHECKPOINT", "TrainResult", "learning_rate", "train"]

CHECKPOINT = Path("checkpoint", "last.ckpt")
"""Within a run's folder."""

_MAY_CHANGE = {
    "train": {"log_every", "evaluate_every", "evaluate_lines", "checkpoint_every", "monitor_every", "timeout"}
}
"""Settings that a resumed run may change, since no weight depends on them."""

_BLANK_WEIGHT = 0.2
"""In the cross entropy of frames. Two frames of three are blank; at full weight they drown the characters."""

_ALONE = World()

StepHook = Callable[[int, Recognizer], contextlib.AbstractContextManager[None]]


class TrainResult(NamedTuple):
    """The trained model, the history, and whether all steps were taken (they are not after Ctrl-C)."""

    model: Recognizer
    history: History
    completed: bool


def train(
    config: Config,
    folder: Path,
    data: DataSource,
    *,
    resume: bool = False,
    console: Console | None = None,
    on_step: StepHook | None = None,
    world: World = _ALONE,
    interrupted: threading.Event | None = None,
) -> TrainResult:
    """Train a recogniser, from the start or from the checkpoint in ``folder``.

    Ctrl-C (SIGINT) or SIGTERM ends training after the step it is in, with a checkpoint; a second Ctrl-C ends it at
    once. Where several ranks train, a signal to one of them ends all, and rank 0 writes the checkpoint.

    Args:
        config: what to train, and how.
        folder: where ``checkpoint/last.ckpt`` is.
        data: what to train on.
        resume: go on from the checkpoint; its steps, losses and weights are those of a run that never stopped.
        console: where progress is shown; a terminal gets a live display, anything else a line now and then.
        on_step: ``on_step(step, model)`` gives a context in which the forward pass of that step runs; steps count
            from 1 here and in the history. Made for :meth:`flatwater.paddle.monitor.NormMonitor.sampling`.
        world: with whom; all of them call this.
        interrupted: ends training in place of the signals, for a caller that handles them.

    Raises:
        CheckpointError: there is no checkpoint to resume from, or it is damaged.
        ConfigError: the checkpoint is of a run with other settings.
        FlatwaterError: the loss is no longer finite.
        DistributedError: a rank died, or did not come.
        OSError: a checkpoint could not be written; the one before it stays.
    """
    training = _Training(config, folder, data, world, resume=resume, on_step=on_step)
    with interruption() if interrupted is None else contextlib.nullcontext(interrupted) as event:
        return training.run(console or Console(), event)


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Of a step counted from 0: up linearly over ``warmup``, then down as a cosine to 1/100 of the peak."""
    rising = int(optimizer.warmup * steps)
    if step < rising:
        return optimizer.learning_rate * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return optimizer.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


class _Training:
    def __init__(
        self, config: Config, folder: Path, data: DataSource, world: World, *, resume: bool, on_step: StepHook | None
    ) -> None:
        self.config = config
        self.data = data
        self.world = world
        self.on_step = on_step
        self.checkpoint_path = folder / CHECKPOINT
        paddle.seed(config.seed)
        self.model, self.policy = build(config, data.alphabet.classes, world.size)
        self.optimizer = _optimizer(config.optimizer, self.model)
        if self.policy is not None:
            self.policy.prepare(self.optimizer)
        self.frame_weight = paddle.ones([data.alphabet.classes])
        self.frame_weight[BLANK] = _BLANK_WEIGHT
        self.step = 0
        self.saved_step = 0
        self.history = History()
        self.losses: list[float] = []  # since the last point of the history
        if resume:
            self._restore()
        self.parallel = world.parallel(self.model)
        self.evaluated = _spread(data.test_set(), config.train.evaluate_lines) if world.first else []

    def run(self, console: Console, interrupted: threading.Event) -> TrainResult:
        settings = self.config.train
        lines = 0
        clock = time.perf_counter()
        with Progress(console, settings.steps, self.step) as progress:
            while self.step < settings.steps and not self._stopped(interrupted):
                batch = self.data.train_batch(self.step, rank=self.world.rank, ranks=self.world.size)
                self.losses.append(self._take_step(batch))
                lines += batch.whole
                self.step += 1
                last = self.step == settings.steps
                if self.step % settings.log_every == 0 or last:
                    now = time.perf_counter()
                    progress.show(self._log(lines / (now - clock)))
                    lines, clock = 0, now
                if self.step % settings.evaluate_every == 0 or last:
                    began = time.perf_counter()
                    self.world.settle(self.model)
                    if self.world.first:
                        progress.show_accuracy(self._evaluate())
                    clock += time.perf_counter() - began
                if self.step % settings.checkpoint_every == 0:
                    self._save()
                progress.advance()
            if self.step != self.saved_step:
                self._save()
        return TrainResult(self.model, self.history, self.step == settings.steps)

    def _stopped(self, interrupted: threading.Event) -> bool:
        """Whether a rank was told to stop: the same on all of them."""
        return any(self.world.sum(f"who stops before step {self.step + 1}", [interrupted.is_set()]))

    def _take_step(self, batch: Batch) -> float:
        self.optimizer.set_lr(self._rate())
        self.parallel.train()
        if self.policy is not None:
            self.policy.on_step(self.step)
        # Of the mean over all lines, in what DataParallel divides by the number of ranks.
        share = self.world.size * len(batch.images) / batch.whole
        images = paddle.to_tensor(batch.images)
        with contextlib.nullcontext() if self.on_step is None else self.on_step(self.step + 1, self.model):
            logits = self.parallel(images)
        ctc = share * F.ctc_loss(
            logits.transpose([1, 0, 2]),
            paddle.to_tensor(batch.labels),
            paddle.to_tensor(batch.frames),
            paddle.to_tensor(batch.label_lengths),
        )
        [value, weight] = self.world.sum(
            f"the loss of step {self.step + 1}", [ctc.item() / self.world.size, _weight_of(batch.alignment)]
        )
        if not math.isfinite(value):
            raise FlatwaterError(
                f"the loss became {value} at step {self.step + 1}; lower optimizer.learning_rate "
                f"(now {self.config.optimizer.learning_rate}), or choose norm.kind=batch_norm"
            )
        self._total(ctc, logits, batch, weight).backward()
        self.optimizer.step()
        self.optimizer.clear_grad()
        return value

    def _total(self, ctc: paddle.Tensor, logits: paddle.Tensor, batch: Batch, weight: float) -> paddle.Tensor:
        """The loss; ``weight`` is that of all frames of the whole batch."""
        aligned = self.config.train.alignment * self.config.train.steps
        if not aligned or batch.alignment is None or self.step >= aligned:
            return ctc
        frames = F.cross_entropy(
            logits, paddle.to_tensor(batch.alignment), weight=self.frame_weight, ignore_index=IGNORE
        )
        share = self.world.size * _weight_of(batch.alignment) / weight
        part = 1 - self.step / aligned
        return part * share * frames + (1 - part) * ctc

    def _rate(self) -> float:
        return learning_rate(self.config.optimizer, self.step, self.config.train.steps)

    def _log(self, lines_per_second: float) -> TrainPoint:
        point = TrainPoint(
            step=self.step,
            loss=float(np.mean(self.losses)),
            lr=self.optimizer.get_lr(),
            lines_per_second=lines_per_second,
        )
        self.losses = []
        self.history.train.append(point)
        return point

    def _evaluate(self) -> Evaluation:
        accuracy = evaluate(self.model, self.evaluated, self.data.alphabet).char_accuracy
        self.history.evaluations.append(Evaluation(step=self.step, char_accuracy=accuracy))
        return self.history.evaluations[-1]

    def _save(self) -> None:
        self.world.settle(self.model)
        self.saved_step = self.step
        if not self.world.first:
            return
        progress = {
            "step": self.step,
            "losses": self.losses,
            "history": self.history.model_dump(),
            "config": self.config.model_dump(mode="json"),
            "alphabet": self.data.alphabet.characters,
        }
        checkpoints.save(self.checkpoint_path, checkpoints.snapshot(self.model, self.optimizer, progress))

    def _restore(self) -> None:
        checkpoint = checkpoints.load(self.checkpoint_path)
        progress = checkpoint.progress
        _check_same_run(progress["config"], self.config)
        if progress["alphabet"] != self.data.alphabet.characters:
            raise CheckpointError(
                f"{self.checkpoint_path}: was trained with another alphabet, so the word list has changed; "
                "restore it, or train anew without --resume"
            )
        checkpoints.restore(checkpoint, self.model, self.optimizer)
        self.step = self.saved_step = progress["step"]
        self.losses = progress["losses"]
        self.history = History.model_validate(progress["history"])


def _optimizer(config: OptimizerConfig, model: Recognizer) -> paddle.optimizer.Optimizer:
    common: dict[str, Any] = {
        "learning_rate": config.learning_rate,
        "parameters": [parameter for parameter in model.parameters() if not parameter.stop_gradient],
        "weight_decay": config.weight_decay,
        "grad_clip": paddle.nn.ClipGradByGlobalNorm(config.clip_norm),
    }
    if config.kind == "adamw":
        return paddle.optimizer.AdamW(**common)
    return paddle.optimizer.Momentum(momentum=config.momentum, use_nesterov=True, **common)


def _weight_of(alignment: npt.NDArray[np.int64] | None) -> float:
    """By what the cross entropy of these frames divides the sum of its terms."""
    if alignment is None:
        return 0.0
    return float(np.where(alignment == BLANK, _BLANK_WEIGHT, 1.0)[alignment != IGNORE].sum())


def _spread(samples: list[Sample], count: int) -> list[Sample]:
    """``count`` of the samples, evenly spaced, or all where there are fewer."""
    count = min(count, len(samples))
    return [samples[i * len(samples) // count] for i in range(count)]


def _check_same_run(saved: dict[str, Any], config: Config) -> None:
    now = config.model_dump(mode="json")
    for section, value in now.items():
        settings = value if isinstance(value, dict) else {None: value}
        for name, setting in settings.items():
            before = saved.get(section) if name is None else saved.get(section, {}).get(name)
            if before != setting and name not in _MAY_CHANGE.get(section, ()):
                key = section if name is None else f"{section}.{name}"
                raise ConfigError(
                    f"the checkpoint was trained with {key}={before!r}, not {setting!r}; "
                    "resume with the same settings, or train anew without --resume"
                )
