"""A network that others trained, with its real statistics: as the program they ship, and as the network behind it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from benchmarks.zoo import TRAINED_PACKAGES, ZOO, trained_program
from networks import evaluate, example, state_of
from paddle.static import InputSpec

import flatwater.paddle as fw
from flatwater.models import inspect_models, verify_models
from flatwater.onnx import fold_onnx
from flatwater.paddle.kinds import BATCH_NORMS

MISSING = [package for package in TRAINED_PACKAGES if find_spec(package) is None]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}, see benchmarks/zoo.py"),
    pytest.mark.filterwarnings("ignore"),  # of the packages, not ours
]

SPEC = [InputSpec([None, 3, 48, 192], "float32", "x")]
NORMS = 35


@pytest.fixture(scope="module")
def network() -> Iterator[Any]:
    path = list(sys.path)
    try:
        yield ZOO["PP-OCR direction classifier, trained"].build()
    except ModuleNotFoundError as error:
        pytest.skip(f"needs {error.name}, which the network imports")
    finally:
        sys.path[:] = path  # the network's package lies inside another


def test_the_program_as_it_is_shipped() -> None:
    (found,) = inspect_models(trained_program())
    assert len(found.norms) == len(found.foldable) == NORMS
    assert not found.training
    report = verify_models(trained_program(), batch_sizes=[1, 6])
    assert report.passed
    assert {row.form for row in report.rows} == {"Paddle Inference, IR on", "Paddle Inference, oneDNN"}


def test_the_network_computes_what_the_program_does(network: Any, tmp_path: Path) -> None:
    norms = [layer for layer in network.sublayers() if isinstance(layer, BATCH_NORMS)]
    assert len(norms) == NORMS
    # Statistics of training, not those that a layer starts with.
    assert all(norm._mean.numpy().any() and norm._variance.numpy().std() > 0 for norm in norms)
    files = fw.export(network, tmp_path / "net", SPEC, ("paddle",), fold=False).files
    report = verify_models(files[0], against=trained_program(), batch_sizes=[1, 6])
    assert report.passed
    assert all(row.max_rel is not None and row.max_rel < 1e-5 and row.argmax == 1.0 for row in report.rows)


def test_another_norm_in_the_network_is_found(network: Any, tmp_path: Path) -> None:
    norms = [(path, layer) for path, layer in network.named_sublayers() if isinstance(layer, BATCH_NORMS)]
    moved = norms[20][1]
    before = moved.bias.numpy()
    fw.export(network, tmp_path / "net", SPEC, ("paddle",), fold=False)
    moved.bias.set_value(before + 0.5)
    try:
        found = fw.verify(network, tmp_path / "net", example(2, 3, 48, 192), batch_sizes=[2], show=False).diverging
    finally:
        moved.bias.set_value(before)
    assert found is not None
    assert found.layer == f"{norms[20][0]} (BatchNorm)"


def test_the_network_is_folded_and_back(network: Any) -> None:
    x, before = example(2, 3, 48, 192), state_of(network)
    expected = evaluate(network, x)
    report = fw.fold(network, x)
    assert len(report.norms) == NORMS
    assert not report.left
    # float32 through 35 convolutions and norms: softmax outputs, of scale 1.
    np.testing.assert_allclose(evaluate(network, x), expected, rtol=0, atol=1e-5)
    report.undo()
    after = state_of(network)
    assert list(after) == list(before)
    assert all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("where", ["live", "in the file"])
def test_folded_as_onnx_it_computes_what_the_program_does(network: Any, where: str, tmp_path: Path) -> None:
    report = fw.export(network, tmp_path / "net", SPEC, ("onnx",), fold=where == "live")
    assert report.onnx_batch_norms == (0 if where == "live" else NORMS)
    path = tmp_path / "net.onnx"
    if where == "in the file":
        assert len(fold_onnx(path, path).folded) == NORMS
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(str(path)).graph.node}
    compared = verify_models(path, against=trained_program(), batch_sizes=[1, 6])
    assert compared.passed
    assert len({row.form for row in compared.rows}) == 4
    assert all(row.argmax == 1.0 for row in compared.rows)
