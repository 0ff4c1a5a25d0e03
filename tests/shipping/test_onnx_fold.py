"""Folding of ONNX files: what can be folded is, what it computes stays, and nothing wrong is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import randomize
from onnx_graphs import FOLDABLE, STAYS, conv_norm
from paddle.static import InputSpec
from paddle.vision.models import mobilenet_v3_small

import flatwater.onnx.fold
import flatwater.paddle as fw
from flatwater.errors import (
    BackendError,
    CheckpointError,
    ExportError,
    FlatwaterError,
    InputError,
    StatisticsError,
    VerificationError,
)
from flatwater.models import inspect_models
from flatwater.onnx import fold_onnx


def save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return path


def interface(model: onnx.ModelProto) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    described = [(one.name, one.shape, one.type) for one in (*session.get_inputs(), *session.get_outputs())]
    return described, [(entry.domain, entry.version) for entry in model.opset_import]


@pytest.mark.parametrize("name", FOLDABLE)
def test_what_can_be_folded_is(name: str, tmp_path: Path) -> None:
    model = FOLDABLE[name]()
    path = save(model, tmp_path)
    content = path.read_bytes()
    report = fold_onnx(path, tmp_path / "new" / "folded.onnx")

    assert path.read_bytes() == content
    assert len(report.folded) == 1
    assert report.verification.passed
    # float32: a fold changes the order of a few hundred products.
    assert all(row.max_rel is not None and row.max_rel < 1e-5 for row in report.verification.rows)
    assert {row.form for row in report.verification.rows} == {
        f"ONNX Runtime, {level}" for level in ("unoptimised", "basic", "extended", "all")
    }
    folded = onnx.load(str(report.path))
    onnx.checker.check_model(folded)
    left = sum(node.op_type == "BatchNormalization" for node in folded.graph.node)
    assert left == len(report.left) == (1 if name == "into the norm before" else 0)
    assert {node.domain for node in folded.graph.node} == {""}
    assert interface(folded) == interface(model)
    assert folded.producer_name == "a test"


@pytest.mark.parametrize("name", STAYS)
def test_what_cannot_be_folded_stays_and_nothing_else_happens(name: str, tmp_path: Path) -> None:
    build, words = STAYS[name]
    path = save(build(), tmp_path)
    report = fold_onnx(path, tmp_path / "folded.onnx", tolerance=1e-5)
    assert report.folded == []
    (reason,) = report.left.values()
    assert words in reason
    assert report.path.read_bytes() == path.read_bytes()


def test_a_network_of_paddles_is_folded_whole(tmp_path: Path) -> None:
    model = randomize(mobilenet_v3_small())
    fw.export(model, tmp_path / "net", [InputSpec([None, 3, 32, 32], "float32")], ["onnx"], fold=False)
    report = fold_onnx(tmp_path / "net.onnx", tmp_path / "net.onnx")
    assert len(report.folded) == 34
    assert report.left == {}
    (found,) = inspect_models(tmp_path / "net.onnx")
    assert found.norms == []
    assert json.loads(json.dumps(report.as_dict()))["verification"]["passed"]
    assert "34 norms folded, 0 left" in str(report)


def test_a_file_of_version_3_whose_weights_are_inputs(tmp_path: Path) -> None:
    model = conv_norm().model(version=3)
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    report = fold_onnx(save(model, tmp_path), tmp_path / "folded.onnx")
    folded = onnx.load(str(report.path))
    onnx.checker.check_model(folded)
    assert [entry.name for entry in folded.graph.input] == ["x"]
    assert len(report.folded) == 1


def test_weights_in_another_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(conv_norm().model(), str(path), save_as_external_data=True, location="weights", size_threshold=0)
    assert len(fold_onnx(path, tmp_path / "folded.onnx").folded) == 1
    (tmp_path / "weights").unlink()
    with pytest.raises(CheckpointError, match="its weights are in another file that cannot be read"):
        fold_onnx(path, tmp_path / "folded.onnx")
    assert len(inspect_models(path)[0].foldable) == 1


def test_the_users_inputs_decide(tmp_path: Path) -> None:
    path = save(conv_norm().model(), tmp_path)
    np.save(tmp_path / "x.npy", np.zeros((3, 4, 9, 8)))
    report = fold_onnx(path, tmp_path / "a.onnx", inputs=[tmp_path / "x.npy"], batch_sizes=[3])
    assert {row.batch for row in report.verification.rows} == {3}
    np.savez(tmp_path / "x.npz", x=np.ones((1, 4, 9, 8), "float32"))
    assert fold_onnx(path, tmp_path / "b.onnx", inputs=[tmp_path / "x.npz"]).verification.passed


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 4, 9, 7)), r"has the shape \['any', 4, 9, 8\], but the array has \[3, 4, 9, 7\]"),
        (np.zeros((4, 9, 8)), "has the shape"),
        (np.zeros((3, 4, 9, 8), complex), "is float32, but the array is complex128"),
        (np.array([{}]), "holds no arrays"),
    ],
)
def test_inputs_that_do_not_fit(array: np.ndarray, words: str, tmp_path: Path) -> None:
    path = save(conv_norm().model(), tmp_path)
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=words):
        fold_onnx(path, tmp_path / "folded.onnx", inputs=[tmp_path / "x.npy"])
    assert not (tmp_path / "folded.onnx").exists()


def test_input_files_that_are_none(tmp_path: Path) -> None:
    path = save(conv_norm().model(), tmp_path)
    (tmp_path / "text.npy").write_text("text")
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    for files, words in (
        (["missing.npy"], "there is no such file"),
        (["text.npy"], "holds no arrays"),
        (["two.npz"], "holds a, b, but not x"),
        (["two.npz", "two.npz"], "give it alone"),
    ):
        with pytest.raises(InputError, match=words):
            fold_onnx(path, tmp_path / "folded.onnx", inputs=[tmp_path / file for file in files])


def test_a_wrong_fold_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        weight = model.graph.initializer[0]
        values = onnx.numpy_helper.to_array(weight) * 1.01
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), weight.name))

    monkeypatch.setattr(flatwater.onnx.fold, "absorb", spoil)
    path = save(conv_norm().model(), tmp_path)
    (tmp_path / "folded.onnx").write_bytes(b"what stood there")
    with pytest.raises(VerificationError, match="it differs in ONNX Runtime, unoptimised at batch 1"):
        fold_onnx(path, tmp_path / "folded.onnx")
    assert (tmp_path / "folded.onnx").read_bytes() == b"what stood there"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folded.onnx", "model.onnx"]


def test_statistics_that_are_not_numbers(tmp_path: Path) -> None:
    model = conv_norm().model()
    (mean,) = (tensor for tensor in model.graph.initializer if tensor.name == "y.mean")
    mean.CopyFrom(onnx.numpy_helper.from_array(np.float32([1, np.nan, 1, 1, 1, 1]), "y.mean"))
    with pytest.raises(StatisticsError, match="the running mean of norm layer 'the y' is nan in channel 1"):
        fold_onnx(save(model, tmp_path), tmp_path / "folded.onnx")
    assert not (tmp_path / "folded.onnx").exists()


def test_a_model_that_does_not_run(tmp_path: Path) -> None:
    model = conv_norm().model(["N", 5, 9, 8])
    with pytest.raises(FlatwaterError) as caught:
        fold_onnx(save(model, tmp_path), tmp_path / "folded.onnx")
    assert isinstance(caught.value, ExportError | InputError)
    assert "\n" not in str(caught.value)
    model = conv_norm().model()
    model.graph.node[0].op_type = "Convolve"
    with pytest.raises(ExportError, match=r"cannot be loaded by ONNX Runtime .*Convolve"):
        fold_onnx(save(model, tmp_path), tmp_path / "folded.onnx")


def test_places_and_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(conv_norm().model(), tmp_path)
    with pytest.raises(ExportError, match="is a folder"):
        fold_onnx(path, tmp_path)
    with pytest.raises(CheckpointError, match="is a folder"):
        fold_onnx(tmp_path, tmp_path / "folded.onnx")
    with pytest.raises(CheckpointError, match="there is no such file"):
        fold_onnx(tmp_path / "nothing.onnx", tmp_path / "folded.onnx")
    with pytest.raises(ExportError, match="cannot be written"):
        fold_onnx(path, path / "below" / "folded.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="onnxruntime is not installed; pip install"):
        fold_onnx(path, tmp_path / "folded.onnx")


def test_the_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flatwater", "fold", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    path, target = save(conv_norm().model(), tmp_path), tmp_path / "folded.onnx"
    plain = run(str(path), "-o", str(target), "--batch", "2")
    assert plain.returncode == 0
    assert "1 norms folded, 0 left" in plain.stdout
    parsed = run(str(path), "-o", str(target), "--json")
    assert json.loads(parsed.stdout)["folded"] == ["the y"]
    target.unlink()
    strict = run(str(path), "-o", str(target), "--tolerance", "1e-12")
    assert strict.returncode == 1
    assert strict.stderr.count("\n") == 1
    assert "nothing was written" in strict.stderr
    assert not target.exists()
