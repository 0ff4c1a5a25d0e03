"""ONNX files at the edges: half precision, nested graphs, fixed batches, other suffixes, NaN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from flatwater.errors import CheckpointError, InputError, StatisticsError
from flatwater.models import inspect_models, verify_models
from flatwater.onnx import fold_onnx

GENERATOR = np.random.default_rng(0)


def parameters(dtype: str = "float32", *, variance: float = 1.0) -> list[onnx.TensorProto]:
    values = {
        "w": GENERATOR.normal(size=(4, 4, 3, 3)),
        "g": np.full(4, 0.7),
        "b": np.full(4, 0.1),
        "m": np.full(4, 0.2),
    }
    stored = [numpy_helper.from_array(value.astype(dtype), name) for name, value in values.items()]
    return [*stored, numpy_helper.from_array(np.full(4, variance, dtype), "v")]


def pair(read: str = "x", write: str = "y") -> list[onnx.NodeProto]:
    return [
        helper.make_node("Conv", [read, "w"], ["c"], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], [write], name="norm"),
    ]


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    stored: list[onnx.TensorProto],
    *,
    dtype: int = TensorProto.FLOAT,
    opset: int = 17,
) -> Path:
    shape = ["N", 4, 6, 6]
    ends = [helper.make_tensor_value_info(name, dtype, shape) for name in "xy"]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    path = save(tmp_path / "half.onnx", pair(), parameters("float16"), dtype=TensorProto.FLOAT16)
    report = fold_onnx(path, tmp_path / "folded.onnx")
    assert report.folded == ["norm"]
    folded = onnx.load(str(tmp_path / "folded.onnx"))
    assert [node.op_type for node in folded.graph.node] == ["Conv"]
    assert {tensor.data_type for tensor in folded.graph.initializer} == {TensorProto.FLOAT16}


def test_statistics_of_a_nested_graph_are_looked_at_too(tmp_path: Path) -> None:
    branches = [
        helper.make_graph(pair("x", "t"), "then", [], [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]),
        helper.make_graph(
            [helper.make_node("Identity", ["x"], ["e"])],
            "else", [], [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
        ),
    ]  # fmt: skip
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["p"]),
        helper.make_node("If", ["p"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    zero = numpy_helper.from_array(np.float32(0), "zero")
    path = save(tmp_path / "if.onnx", nodes, [*parameters(variance=float("nan")), zero])
    with pytest.raises(StatisticsError, match="'norm' is nan"):
        fold_onnx(path, tmp_path / "folded.onnx")
    assert not (tmp_path / "folded.onnx").exists()


def test_a_batch_that_the_model_fixes_inside_is_said_to_be_the_reason(tmp_path: Path) -> None:
    shape = numpy_helper.from_array(np.array([2, 4, 6, 6]), "shape")
    nodes = [*pair("x", "z"), helper.make_node("Reshape", ["z", "shape"], ["y"])]
    path = save(tmp_path / "fixed.onnx", nodes, [*parameters(), shape])
    with pytest.raises(InputError, match=r"does not run at batch size 1: .*; give batch sizes that it takes"):
        verify_models(path)
    assert verify_models(path, batch_sizes=[2]).passed


def test_a_model_that_yields_nan_does_not_pass(tmp_path: Path) -> None:
    path = save(tmp_path / "nan.onnx", [*pair("x", "z"), helper.make_node("Sqrt", ["z"], ["y"])], parameters())
    report = verify_models(path)
    assert not report.failures  # NaN equals NaN
    assert not report.passed
    assert "yields NaN" in str(report)


@pytest.mark.parametrize("suffix", ["json", "txt", "textproto"])
def test_a_suffix_does_not_say_how_a_file_is_read(suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"net.{suffix}", pair(), parameters())
    assert fold_onnx(path, tmp_path / "folded.onnx").folded == ["norm"]
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="is not an ONNX model"):
        fold_onnx(path, tmp_path / "folded.onnx")


@pytest.mark.parametrize(("is_test", "training"), [(None, 1), (0, 1), (1, 0)])
def test_before_operator_set_7_a_norm_trains_unless_it_says_otherwise(
    is_test: int | None, training: int, tmp_path: Path
) -> None:
    nodes = pair()
    if is_test is not None:
        nodes[1].attribute.append(helper.make_attribute("is_test", is_test))
    (found,) = inspect_models(save(tmp_path / "old.onnx", nodes, parameters(), opset=6))
    assert len(found.training) == training
    assert len(found.foldable) == 1 - training
