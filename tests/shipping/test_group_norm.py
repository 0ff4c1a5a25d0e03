"""Group and instance norm on their way to ONNX, where paddle2onnx's own conversion of group norm is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest

import flatwater.paddle as fw
from flatwater.errors import ExportError


@pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
def test_two_group_norms_export_and_agree(data_format: str, tmp_path: Path) -> None:
    # A convolution after the input would not be converted in NHWC; the norms alone are.
    paddle.seed(0)
    model = paddle.nn.Sequential(
        fw.GroupNorm(4, 16, act="relu", data_format=data_format),
        paddle.nn.Sigmoid(),
        fw.GroupNorm(8, 16, data_format=data_format, weight_attr=False),
    )
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.set_value(
                np.random.default_rng(parameter.size).uniform(0.5, 2.0, parameter.shape).astype("float32")
            )
    shape = [None, 16, None, None] if data_format == "NCHW" else [None, None, None, 16]
    report = fw.export(model, tmp_path / "model", [paddle.static.InputSpec(shape, "float32", "x")])
    assert report.verification.passed
    assert {row.form for row in report.verification.rows} >= {"ONNX Runtime, all", "paddle.jit.load"}


def test_instance_norms_export_and_agree(tmp_path: Path) -> None:
    paddle.seed(0)
    model = paddle.nn.Sequential(paddle.nn.Conv2D(3, 8, 3), fw.InstanceNorm2D(8, act="relu"), fw.InstanceNorm2D(8))
    report = fw.export(model, tmp_path / "model", [paddle.static.InputSpec([None, 3, 20, 20], "float32", "x")])
    assert report.verification.passed


def test_instance_norm_of_channels_last_exports_and_agrees(tmp_path: Path) -> None:
    model = paddle.nn.Sequential(fw.InstanceNorm2D(8, act="relu", data_format="NHWC"))
    report = fw.export(model, tmp_path / "model", [paddle.static.InputSpec([None, None, None, 8], "float32", "x")])
    assert report.verification.passed


def test_what_paddle2onnx_cannot_convert_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    model = paddle.nn.Sequential(paddle.nn.Conv2D(3, 8, 3, data_format="NHWC"), fw.BatchNorm2D(8, data_format="NHWC"))
    spec = [paddle.static.InputSpec([None, 20, 20, 3], "float32", "x")]
    with pytest.raises(ExportError, match="NHWC"):
        fw.export(model, tmp_path / "model", spec)
    assert not list(tmp_path.iterdir())
    assert fw.export(model, tmp_path / "model", spec, formats=("paddle",)).verification.passed
