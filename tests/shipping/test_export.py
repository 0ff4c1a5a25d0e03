"""Export: files that are proven, or none; and a model that is as it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import paddle
import pytest
from networks import CONV_KINDS, evaluate, example, randomize, state_of
from paddle import nn
from paddle.static import InputSpec

import flatwater.paddle as fw
from flatwater.errors import BackendError, ExportError, FlatwaterError, InputError, VerificationError
from flatwater.paddle.shipping.export import export

IMAGE = [InputSpec([None, 3, 64, 64], "float32", "image")]


class OtherWhenCaptured(nn.Layer):
    """Computes something else in a captured program than live: what export must never let through."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x if paddle.in_dynamic_mode() else x + 0.1


def toy(*more: nn.Layer) -> nn.Layer:
    return randomize(nn.Sequential(fw.ConvBNLayer(3, 4), *more, nn.Conv2D(4, 4, 3), nn.BatchNorm2D(4)))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small"])
def test_networks_export_without_batch_norm(name: str, tmp_path: Path) -> None:
    model = randomize(getattr(paddle.vision.models, name)(pretrained=False))
    fw.convert(model)
    before, forward = state_of(model), model.forward
    expected = evaluate(model, example(2, 3, 64, 64))

    report = export(model, tmp_path / "new" / name, IMAGE)

    assert report.verification.passed
    assert report.onnx_batch_norms == 0
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        f"{name}.json",
        f"{name}.onnx",
        f"{name}.pdiparams",
    ]
    graph = onnx.load(tmp_path / "new" / f"{name}.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param
    # The live model is what it was.
    assert model.forward == forward
    assert all(layer.training for layer in model.sublayers())
    after = state_of(model)
    assert list(after) == list(before)
    assert all(np.array_equal(after[key], before[key]) for key in before)
    # Paddle's own sums in float32 differ from run to run: MKL takes another road where an array lies otherwise.
    np.testing.assert_allclose(
        evaluate(model, example(2, 3, 64, 64)), expected, rtol=0, atol=1e-5 * abs(expected).max()
    )


@pytest.mark.parametrize("kind", ["conv1d", "depthwise", "transposed", "linear", "any rank", "synchronised", "ours"])
def test_every_kind_of_layer_exports(kind: str, tmp_path: Path) -> None:
    build, shape = CONV_KINDS[kind]
    model = randomize(nn.Sequential(*build()))
    report = export(model, tmp_path / "model", [InputSpec([None, *shape[1:]], "float32")])
    assert report.onnx_batch_norms == 0
    assert len(report.fold.folded) >= 1
    if kind == "synchronised":
        assert type(model[1]) is nn.SyncBatchNorm


class Residual(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = fw.ConvBNLayer(3, 4, act="swish"), fw.ConvBNLayer(4, 4, act="relu6")

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = self.first(x)
        return self.second(y, y)


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "as it is"])
@pytest.mark.parametrize("size", [16, None], ids=["fixed", "dynamic"])
def test_fused_residuals_and_activations_export(size: int | None, fold: bool, tmp_path: Path) -> None:
    specs = [InputSpec([None, 3, size, size], "float32")]
    report = export(randomize(Residual()), tmp_path / "model", specs, fold=fold)
    assert report.verification.passed
    assert report.onnx_batch_norms == (0 if fold else 2)


def test_float64_exports_without_onednn_which_has_none(tmp_path: Path) -> None:
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4)).to(dtype="float64"))
    report = export(model, tmp_path / "model", [InputSpec([None, 3, 8, 8], "float64")], ("paddle",))
    assert all(row.max_rel < 1e-12 for row in report.verification.rows)


def test_without_folding_the_norms_stay_in_the_graph(tmp_path: Path) -> None:
    report = export(toy(), tmp_path / "model", IMAGE, fold=False)
    assert report.fold is None
    assert report.onnx_batch_norms == 2
    assert "2 BatchNormalization nodes" in str(report)


@pytest.mark.parametrize(("formats", "suffixes"), [(("paddle",), {".json", ".pdiparams"}), (("onnx",), {".onnx"})])
def test_only_the_formats_asked_for_are_written(formats: Any, suffixes: set[str], tmp_path: Path) -> None:
    export(toy(), tmp_path / "model", IMAGE, formats)
    assert {file.suffix for file in tmp_path.iterdir()} == suffixes


@pytest.mark.parametrize("fold", [True, False])
def test_a_diverging_program_is_not_written_and_the_layer_is_named(fold: bool, tmp_path: Path) -> None:
    model = toy(OtherWhenCaptured())
    before = state_of(model)
    (tmp_path / "model.onnx").write_bytes(b"what stood there")
    with pytest.raises(VerificationError, match=r"first layer to diverge is 1 \(OtherWhenCaptured\)") as caught:
        export(model, tmp_path / "model", IMAGE, fold=fold)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"what stood there"
    after = state_of(model)
    assert list(after) == list(before)
    assert all(np.array_equal(after[key], before[key]) for key in before)
    assert all(layer.training for layer in model.sublayers())


def test_a_norm_that_uses_the_batch_in_eval_is_caught(tmp_path: Path) -> None:
    """Paddle Inference uses running statistics where the live layer uses the batch's."""
    model = randomize(nn.Sequential(nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4, use_global_stats=False)))
    before = state_of(model)
    with pytest.raises(VerificationError, match=r"Paddle Inference.*1 \(BatchNorm2D\)"):
        export(model, tmp_path / "model", IMAGE)
    assert not list(tmp_path.iterdir())
    assert all(np.array_equal(value, before[name]) for name, value in state_of(model).items())


def test_what_is_decoded_has_to_be_equal_too(tmp_path: Path) -> None:
    def read(outputs: list[np.ndarray]) -> list[str]:
        return ["".join("abcd"[index] for index in sample.argmax(0).flat) for sample in outputs[0]]

    model = toy()
    report = export(model, tmp_path / "model", IMAGE, ("paddle",), decode=read).verification
    assert all(row.decoded == 1.0 for row in report.rows)
    calls: list[int] = []

    def fickle(outputs: list[np.ndarray]) -> list[int]:
        calls.append(len(outputs[0]))
        return [len(calls)] * len(outputs[0])

    with pytest.raises(
        VerificationError, match=r"paddle\.jit\.load at batch 1: only 0% is decoded alike; .*within the"
    ):
        export(model, tmp_path / "other", IMAGE, ("paddle",), decode=fickle)
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize("package", ["paddle2onnx", "onnx", "onnxruntime"])
def test_a_missing_package_is_named_and_nothing_is_written(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=f"{package} is not installed; pip install"):
        export(toy(), tmp_path / "model", IMAGE)
    assert not list(tmp_path.iterdir())


def test_sizes_other_than_the_batch_may_be_dynamic(tmp_path: Path) -> None:
    report = export(toy(), tmp_path / "model", [InputSpec([None, 3, None, None], "float32")])
    assert report.verification.passed


def test_a_fixed_batch_is_verified_at_that_size(tmp_path: Path) -> None:
    report = export(toy(), tmp_path / "model", [InputSpec([3, 3, 16, 16], "float32")])
    assert {row.batch for row in report.verification.rows} == {3}


def test_hooks_on_the_model_itself_are_exported(tmp_path: Path) -> None:
    model = toy()
    model.register_forward_post_hook(lambda layer, inputs, output: output * 3)
    assert export(model, tmp_path / "model", IMAGE).verification.passed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_spec": []}, InputError, "not a list of paddle.static.InputSpec"),
        ({"input_spec": [[1, 3, 8, 8]]}, InputError, "give paddle.static.InputSpec"),
        ({"formats": ("tflite",)}, InputError, "tflite"),
        ({"formats": "onnx"}, InputError, "formats='onnx'"),
        ({"input_spec": [InputSpec([None, 5, 8, 8], "float32")]}, ExportError, "give example_inputs"),
        ({"example_inputs": [example(1, 3, 8, 8)] * 2}, InputError, "2 example inputs for an input_spec of 1"),
        ({"path": "model.onnx"}, InputError, "give the prefix"),
    ],
)
def test_bad_arguments(
    arguments: dict[str, Any],
    error: type[FlatwaterError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as caught:
        export(**{"model": toy(), "path": "model", "input_spec": IMAGE, **arguments})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "model.json").mkdir()
    with pytest.raises(ExportError, match=r"model\.json: is a folder"):
        export(toy(), tmp_path / "model", IMAGE)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="is a file"):
        export(toy(), tmp_path / "file" / "model", IMAGE)


@pytest.mark.parametrize("former", [b"what stood there", None], ids=["over a model", "new"])
def test_where_one_file_cannot_be_moved_none_is(
    former: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "model.json"
    if former is not None:
        program.write_bytes(former)
    move = Path.replace

    def refuse_parameters(source: Path, target: Path) -> Path:
        if Path(target).name == "model.pdiparams":
            raise PermissionError(1, "Operation not permitted")
        return move(source, target)

    monkeypatch.setattr(Path, "replace", refuse_parameters)
    with pytest.raises(ExportError, match=r"cannot be written \(Operation not permitted\)"):
        export(toy(), tmp_path / "model", IMAGE)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({program.name: former} if former else {})


def test_nothing_is_installed_behind_the_users_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """paddle2onnx runs Polygraphy, which runs pip, unless it is called as export calls it."""
    package = tmp_path / "packages" / "polygraphy"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('polygraphy was imported')")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))  # for the process that converts
    assert export(toy(), tmp_path / "model", IMAGE).verification.passed
