"""Where a form starts to compute something else: the norm layer is named, live, in files, and of optimisers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import paddle
import pytest
from networks import example, randomize
from onnx_graphs import FOLDABLE
from paddle import nn
from paddle.static import InputSpec

import flatwater.onnx.fold
import flatwater.onnx.runtime
import flatwater.paddle as fw
from flatwater.errors import VerificationError
from flatwater.inspection import Graph, Norm, Operation
from flatwater.models import verify_models
from flatwater.onnx import fold_onnx, onnx_forms, open_onnx
from flatwater.paddle.shipping.conversion import convert_to_onnx
from flatwater.paddle.shipping.verify import verify
from flatwater.verify import Arrays, Form, Inside, Run, compare_forms, find_divergence, look_inside

IMAGE = [InputSpec([None, 3, 8, 8], "float32", "image")]
NORMS = ["start.0", "first.1", "fused.bn", "left.1", "right.1", "last.0"]


class Network(nn.Layer):
    """Norms before convolutions, behind them, with an activation of their own, and in two branches."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.BatchNorm2D(3), nn.Conv2D(3, 3, 1))
        self.first = nn.Sequential(nn.Conv2D(3, 4, 3, padding=1), nn.BatchNorm2D(4), nn.ReLU())
        self.fused = fw.ConvBNLayer(4, 4)
        self.left = nn.Sequential(nn.Conv2D(4, 4, 3, padding=1), nn.BatchNorm2D(4, **norm))
        self.right = nn.Sequential(nn.Conv2D(4, 4, 1), nn.BatchNorm2D(4))
        self.last = nn.Sequential(nn.BatchNorm2D(4), nn.Conv2D(4, 3, 1))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.fused(self.first(self.start(x)))
        return self.last(self.left(x) + self.right(x))


def network(seed: int = 3, **norm: Any) -> nn.Layer:
    paddle.seed(seed)
    model = randomize(Network(**norm))
    model.eval()
    return model


def capture(model: nn.Layer, prefix: Path) -> Path:
    """What Paddle's own tools make of it: nothing is folded and nothing verified."""
    paddle.jit.save(model, str(prefix), IMAGE)
    convert_to_onnx(*(prefix.with_suffix(suffix) for suffix in (".json", ".pdiparams", ".onnx")), "network")
    return prefix


def move(model: nn.Layer, path: str) -> None:
    norm = dict(model.named_sublayers())[path]
    norm.weight.set_value(norm.weight * 1.05)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return capture(network(), tmp_path_factory.mktemp("plain") / "net")


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network, but for one norm."""
    model = network()
    move(model, "left.1")
    return capture(model, tmp_path_factory.mktemp("moved") / "net")


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folded") / "net"
    assert fw.export(network(), path, IMAGE).onnx_batch_norms == 0
    return path


@pytest.mark.parametrize("path", NORMS)
@pytest.mark.parametrize("kept", ["plain", "folded"])
def test_the_live_layer_that_the_files_compute_otherwise(kept: str, path: str, request: pytest.FixtureRequest) -> None:
    model, files = network(), request.getfixturevalue(kept)
    move(model, path)
    report = verify(model, files, example(2, 3, 8, 8), batch_sizes=[2], show=False)
    assert report.diverging is not None
    assert report.diverging.form == "paddle.jit.load"
    assert report.diverging.layer == f"{path} (BatchNorm2D)"
    assert f"the first norm layer to diverge is {path} (BatchNorm2D)" in str(report)


def test_what_agrees_is_not_looked_into(plain: Path) -> None:
    report = verify(network(), plain, example(2, 3, 8, 8), batch_sizes=[2], show=False)
    assert report.passed
    assert report.diverging is None


def test_what_diverges_outside_norms_is_not_blamed_on_one(plain: Path) -> None:
    model = network()
    model.last[1].weight.set_value(model.last[1].weight * 1.05)
    report = verify(model, plain, example(2, 3, 8, 8), batch_sizes=[2], show=False)
    assert report.diverging is not None
    assert report.diverging.layer is None
    assert report.diverging.words.endswith("may be behind last.0 (BatchNorm2D)")


@pytest.mark.parametrize(
    ("suffix", "against", "name"),
    [
        (".json", ".json", r"Sequential(_\d+)?/BatchNorm2D \(batch_norm2d_\d+\)"),
        (".onnx", ".json", r"Sequential(_\d+)?/BatchNorm2D \(batch_norm2d_\d+\)"),
        (".onnx", ".onnx", r"BatchNormalization\.3"),
    ],
)
def test_files_against_files(suffix: str, against: str, name: str, plain: Path, moved: Path) -> None:
    report = verify_models(moved.with_suffix(suffix), against=plain.with_suffix(against), batch_sizes=[2])
    assert report.diverging is not None
    assert re.fullmatch(name, str(report.diverging.layer))
    record = report.as_dict()["diverging"]
    assert record == {"form": report.rows[0].form, "layer": report.diverging.layer, "words": report.diverging.words}


def test_where_no_norm_is_left_the_convolution_that_took_it_up_is_named(folded: Path, moved: Path) -> None:
    report = verify_models(moved.with_suffix(".json"), against=folded, batch_sizes=[2])
    assert report.diverging is not None
    assert re.fullmatch(
        r"the first layer with weights to diverge is conv2d Sequential(_\d+)?/Conv2D", report.diverging.words
    )


def test_a_norm_that_only_the_optimiser_gets_wrong(tmp_path: Path) -> None:
    """With use_global_stats=False a program takes the batch's statistics, but the running ones in oneDNN's passes."""
    model = network(use_global_stats=False)
    report = verify(model, capture(model, tmp_path / "net"), example(4, 3, 8, 8), batch_sizes=[4], show=False)
    assert {row.form for row in report.failures} == {"Paddle Inference, oneDNN"}
    assert report.diverging is not None
    assert report.diverging.form == "Paddle Inference, oneDNN"
    assert report.diverging.words == "as it optimises the file, the first norm layer to diverge is left.1 (BatchNorm2D)"


def test_onnx_is_looked_into_as_it_stands_and_as_it_is_optimised(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[str] = []

    def note(model: Path | bytes, level: str) -> Any:
        levels.append(level)
        return open_onnx(model, level)

    monkeypatch.setattr(flatwater.onnx.runtime, "open_onnx", note)
    image = np.ones((2, 3, 8, 8), "float32")
    for form in onnx_forms(plain.with_suffix(".onnx")):
        assert form.inside is not None
        inside = form.inside()
        one, last = inside.tensors[0], inside.tensors[-1]
        found = [load([last, one])([image]) for load in (inside.plain, inside.load)]
        assert [array.shape for array in found[0]] == [array.shape for array in found[1]]
        assert found[0][0].shape == (2, 3, 8, 8)  # the model's own output, asked for first
    assert levels[::2] == ["ORT_DISABLE_ALL"] * 4
    assert levels[1::2] == ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"]


def test_a_fold_that_went_wrong_names_its_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        weight = model.graph.initializer[0]
        values = onnx.numpy_helper.to_array(weight) * 1.01
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), weight.name))

    monkeypatch.setattr(flatwater.onnx.fold, "absorb", spoil)
    onnx.save(FOLDABLE["grouped"](), str(tmp_path / "model.onnx"))
    with pytest.raises(VerificationError, match="the first norm layer to diverge is the y; nothing was written"):
        fold_onnx(tmp_path / "model.onnx", tmp_path / "folded.onnx")


COUNT = 40
TENSORS = [f"y{index}" for index in range(COUNT)]


class Chain:
    """Norms in a row, each adding one; ``optimised``, all from ``wrong`` on are off."""

    def __init__(self, wrong: int) -> None:
        self.wrong = wrong
        self.loaded: list[Sequence[str]] = []

    def form(self) -> Form:
        return Form("chain", lambda: self._load(["y39"], optimised=True), self._inside)

    def _inside(self) -> Inside:
        operations = [
            Operation(f"norm {index}", "norm", (f"y{index - 1}",), (name,), Norm("batch_norm", "", (), None, None))
            for index, name in enumerate(TENSORS)
        ]
        graph = Graph(operations, [], ["y39"])
        return Inside(
            graph,
            TENSORS,
            lambda names: self._load(names, optimised=False),
            lambda names: self._load(names, optimised=True),
        )

    def _load(self, names: Sequence[str], *, optimised: bool) -> Run:
        self.loaded.append(names)

        def run(inputs: Arrays) -> Arrays:
            indices = [int(name[1:]) for name in names]
            off = [0.5 if optimised and index >= self.wrong else 0.0 for index in indices]
            return [inputs[0] + index + more for index, more in zip(indices, off, strict=True)]

        return run


@pytest.mark.parametrize("wrong", [0, 1, 17, 38, 39])
def test_an_optimiser_is_looked_into_one_tensor_at_a_time(wrong: int) -> None:
    right, chain = Chain(COUNT), Chain(wrong)
    look = look_inside(right.form())
    report = compare_forms(
        right.form().load(), [chain.form()], [np.ones((2, 3))], batch_sizes=[2], tolerance=1e-4, look=look
    )
    assert report.diverging is not None
    assert report.diverging.layer == f"norm {wrong}"
    assert report.diverging.words.startswith("as it optimises the file")
    assert chain.loaded[:2] == [["y39"], TENSORS]
    assert all(len(names) == 1 for names in chain.loaded[2:])
    assert len(chain.loaded[2:]) <= 6  # of 40 norms


class Branches(Chain):
    """Norms and activations in branches, one after the other in each, and perhaps a sum of all; one branch is off."""

    def __init__(self, wrong: int, width: int, summed: bool) -> None:
        super().__init__(wrong)
        self.width, self.summed = width, summed

    def _inside(self) -> Inside:
        operations = [
            Operation(
                f"norm {index}", "norm", (f"r{index - self.width}",), (name,), Norm("batch_norm", "", (), None, None)
            )
            for index, name in enumerate(TENSORS)
        ]
        operations += [Operation(f"relu {name}", "relu", (name,), (f"r{name[1:]}",)) for name in TENSORS]
        ends = TENSORS[-self.width :]
        if self.summed:
            operations.append(Operation("sum", "add", tuple(ends), ("z",)))
        return super()._inside()._replace(graph=Graph(operations, [], ["z"] if self.summed else ends))

    def _load(self, names: Sequence[str], *, optimised: bool) -> Run:
        self.loaded.append(names)

        def run(inputs: Arrays) -> Arrays:
            indices = [int(name[1:]) for name in names]
            wrong = [optimised and index >= self.wrong and (index - self.wrong) % self.width == 0 for index in indices]
            return [inputs[0] + index + 0.5 * off for index, off in zip(indices, wrong, strict=True)]

        return run


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("width", [2, 3, COUNT])
@pytest.mark.parametrize("wrong", [0, 1, 16, 17, 33, 37, 38, 39])
def test_an_optimiser_that_is_wrong_in_one_of_several_branches(wrong: int, width: int, summed: bool) -> None:
    inputs = [np.ones((2, 3))]
    look = look_inside(Branches(COUNT, width, summed).form())
    assert look is not None
    found = find_divergence(Branches(wrong, width, summed).form(), look(inputs), inputs, 1e-4)
    assert found is not None
    assert found.layer == f"norm {wrong}"


def test_a_form_that_cannot_be_looked_into_is_said_to_be_so() -> None:
    class Closed(Chain):
        def _load(self, names: Sequence[str], *, optimised: bool) -> Run:
            if len(names) > 1:
                raise RuntimeError("no more outputs")
            return super()._load(names, optimised=optimised)

    inputs = [np.ones((2, 3))]
    look = look_inside(Chain(COUNT).form())
    assert look is not None
    report = compare_forms(
        Chain(COUNT).form().load(), [Closed(3).form()], inputs, batch_sizes=[2], tolerance=1e-4, look=look
    )
    assert report.diverging is not None
    assert report.diverging.layer is None
    assert report.diverging.words == "where it diverges could not be found: no more outputs"
    assert look_inside(Form("closed", Chain(3).form().load)) is None
    assert find_divergence(Form("closed", Chain(3).form().load), look(inputs), inputs, 1e-4) is None
