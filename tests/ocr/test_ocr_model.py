"""The recogniser: shapes, its description, and that it goes through export with any batch and width."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import paddle
import pytest

import flatwater.paddle as fw
from flatwater.recipes.ocr.config import ModelConfig, NormConfig
from flatwater.recipes.ocr.data import STRIDE, Sample
from flatwater.recipes.ocr.evaluate import evaluate
from flatwater.recipes.ocr.labels import Alphabet
from flatwater.recipes.ocr.model import Recognizer

SMALL = ModelConfig(channels=(8, 8, 16, 16), features=16)
SHAPES = [(1, 16), (3, 37), (17, 160)]


def images(count: int, width: int) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(width).normal(size=(count, 1, 32, width)).astype(np.float32))


@pytest.mark.parametrize("kind", ["batch_norm", "group_norm", "instance_norm", "none"])
@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_a_frame_for_every_four_columns(kind: str, count: int, width: int) -> None:
    model = Recognizer(SMALL, NormConfig.model_validate({"kind": kind}), classes=11)
    model.eval()
    assert model(images(count, width)).shape == [count, math.ceil(width / STRIDE), 11]


def test_the_norm_is_the_configured_one() -> None:
    norms = {
        "batch_norm": fw.BatchNorm2D,
        "group_norm": fw.GroupNorm,
        "instance_norm": fw.InstanceNorm2D,
    }
    for kind, layer in norms.items():
        model = Recognizer(
            SMALL, NormConfig.model_validate({"kind": kind, "epsilon": 1e-3, "momentum": 0.7}), classes=3
        )
        found = [sublayer for sublayer in model.sublayers() if isinstance(sublayer, layer)]
        assert len(found) == 5
        assert all(norm._epsilon == 1e-3 for norm in found)
        assert kind != "batch_norm" or all(norm._momentum == 0.7 for norm in found)


def test_exported_programs_take_any_batch_and_width(tmp_path: Path) -> None:
    model = Recognizer(SMALL, NormConfig(), classes=11)
    model.eval()
    path = str(tmp_path / "recognizer")
    paddle.jit.save(model, path, input_spec=[paddle.static.InputSpec([None, 1, 32, None], "float32")])
    reloaded = paddle.jit.load(path)
    for count, width in SHAPES:
        x = images(count, width)
        # float32, and the program may add in another order.
        np.testing.assert_allclose(reloaded(x).numpy(), model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_accuracy_is_what_the_readings_say() -> None:
    """A stand-in that reads every line as 中中, whatever stands there."""

    class Constant(paddle.nn.Layer):
        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            logits = np.zeros((x.shape[0], -(-x.shape[3] // STRIDE), 4), np.float32)
            logits[:, :, 0] = 5
            logits[:, [0, 2], 1] = 9
            return paddle.to_tensor(logits)

    blank = np.zeros((32, 64), np.uint8)
    wide = np.zeros((32, 90), np.uint8)
    samples = [Sample("中中", wide), Sample("中文", blank), Sample("文字文字", blank), Sample("中", wide)]
    model = Constant()
    model.train()
    result = evaluate(model, samples, Alphabet("中文字"), batch_size=2)
    assert result.char_accuracy == pytest.approx(1 - (0 + 1 + 4 + 1) / 9)
    assert (result.line_accuracy, result.lines, result.distinct_characters) == (0.25, 4, 3)
    assert [(mistake.line, mistake.read) for mistake in result.mistakes] == [(1, "中中"), (2, "中中"), (3, "中中")]
    assert model.training
