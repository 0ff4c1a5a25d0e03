"""Verification: what is equal passes, what is not does not, and files that are no models are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from networks import evaluate, example, randomize
from paddle import nn
from paddle.static import InputSpec

import flatwater.paddle as fw
from flatwater.errors import CheckpointError, InputError, SurgeryError
from flatwater.paddle.shipping.export import export
from flatwater.paddle.shipping.verify import verify
from flatwater.rounding import shaken
from flatwater.verify import Arrays, Form, Run, Written, compare_forms, difference, largest_difference, resize_batch

IMAGE = [InputSpec([None, 3, 8, 8], "float32", "image")]
INF = float("inf")


def network() -> nn.Layer:
    return randomize(nn.Sequential(fw.ConvBNLayer(3, 4), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(4, 2)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Layer, Path]:
    model = network()
    path = tmp_path_factory.mktemp("exported") / "model"
    export(model, path, IMAGE)
    return model, path


def copy_of(path: Path, folder: Path) -> Path:
    for file in path.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / path.name


@pytest.mark.parametrize(
    ("reference", "other", "max_abs", "max_rel"),
    [
        ([1.0, -4.0], [1.0, -4.5], 0.5, 0.125),
        ([0.0, 0.0], [0.0, 0.0], 0.0, 0.0),
        ([0.0, 0.0], [0.0, 1e-9], 1e-9, INF),
        ([np.nan, 2.0], [np.nan, 1.0], 1.0, 0.5),
        ([np.nan, 2.0], [0.0, 2.0], INF, INF),
        ([1.0, 2.0], [np.nan, 2.0], INF, INF),
        ([INF, 2.0], [INF, 2.0], 0.0, 0.0),
        ([INF, 2.0], [-INF, 2.0], INF, INF),
        ([1.0, 2.0], [[1.0, 2.0]], INF, INF),
        ([], [], 0.0, 0.0),
        ([3.0], 3.0, 0.0, 0.0),
        ([7, 8], [7, 9], 1.0, 0.125),
    ],
)
def test_difference(reference: list[float], other: list[float], max_abs: float, max_rel: float) -> None:
    found = difference(np.array(reference), np.array(other))
    assert (found.max_abs, found.max_rel) == (max_abs, max_rel)


def test_each_output_is_measured_on_its_own_scale() -> None:
    large, small = np.array([1000.0]), np.array([0.001])
    found = largest_difference([large, small], [large + 0.1, small + 0.0005])
    assert found.max_abs == pytest.approx(0.1)
    assert found.max_rel == pytest.approx(0.5)
    assert largest_difference([large], [large, small]).note == "2 outputs instead of 1"


def test_batches_are_cut_and_repeated() -> None:
    image, constant = np.arange(6).reshape(3, 2), np.array([9.0])
    floats = np.ones((3, 2), "float32")
    grown, kept, varied = resize_batch([image, constant, floats], 5)
    assert grown[:, 0].tolist() == [0, 2, 4, 0, 2]
    assert kept is constant
    assert varied.dtype == np.float32
    np.testing.assert_array_equal(varied[:, 0], np.array([1, 1, 1, 0.8, 0.8], "float32"))
    assert resize_batch([image], 1)[0].tolist() == [[0, 1]]


def test_a_form_that_fails_is_a_row_and_not_a_crash() -> None:
    def broken() -> object:
        raise RuntimeError("no such operator\nand a long stack")

    def run_broken(inputs: list[np.ndarray]) -> list[np.ndarray]:
        raise ValueError("bad axis")

    forms = [Form("a", broken), Form("b", lambda: run_broken), Form("c", lambda: lambda inputs: inputs)]  # type: ignore[arg-type]
    report = compare_forms(lambda inputs: inputs, forms, [np.ones((2, 3))], batch_sizes=(1,), tolerance=0.0)
    assert [row.passed for row in report.rows] == [False, False, True]
    assert report.rows[0].note.startswith("cannot be loaded: ")
    assert report.rows[1].note == "fails to run: bad axis"
    assert not report.passed
    assert "FAIL" in str(report)
    assert "bad axis" in str(report)


def test_every_form_at_every_batch_size(exported: tuple[nn.Layer, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, path = exported
    model.train()
    report = verify(model, path, example(3, 3, 8, 8))
    assert report.passed
    assert model.training
    forms = {row.form for row in report.rows}
    assert {"paddle.jit.load", "Paddle Inference, IR off", "Paddle Inference, IR on", "ONNX Runtime, all"} <= forms
    assert {(row.form, row.batch) for row in report.rows} == {(form, size) for form in forms for size in (1, 2, 17)}
    assert "ONNX Runtime" in capsys.readouterr().out
    assert json.loads(json.dumps(report.as_dict()))["rows"][0]["tolerance"] == 1e-4


def test_another_model_does_not_pass(exported: tuple[nn.Layer, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, path = exported
    other = network()
    other.set_state_dict(model.state_dict())
    assert verify(other, path, example(3, 3, 8, 8), show=False).passed
    other[3].weight.set_value(other[3].weight * 1.01)
    report = verify(other, path, example(3, 3, 8, 8), batch_sizes=[2], show=False)
    assert not any(row.passed for row in report.rows)
    assert 1e-4 < report.rows[0].max_rel < 2e-2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", [".json", ".pdiparams", ".onnx"])
@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_damaged_files_are_named(exported: tuple[nn.Layer, Path], tmp_path: Path, suffix: str, damage: str) -> None:
    model, path = exported
    copy = copy_of(path, tmp_path)
    file = copy.with_suffix(suffix)
    content = file.read_bytes()
    file.write_bytes(b"garbage " * 50 if damage == "garbage" else content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=file.name) as caught:
        verify(model, copy, example(2, 3, 8, 8), show=False)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(exported: tuple[nn.Layer, Path], tmp_path: Path) -> None:
    model, path = exported
    with pytest.raises(CheckpointError, match=r"there is no nothing\.json and no nothing\.onnx"):
        verify(model, tmp_path / "nothing", example(2, 3, 8, 8))
    copy = copy_of(path, tmp_path)
    copy.with_suffix(".pdiparams").unlink()
    with pytest.raises(CheckpointError, match=r"model\.pdiparams: is missing"):
        verify(model, copy, example(2, 3, 8, 8))


def test_bad_arguments(exported: tuple[nn.Layer, Path]) -> None:
    model, path = exported
    with pytest.raises(InputError, match=r"give the prefix without \.onnx"):
        verify(model, path.with_suffix(".onnx"), example(2, 3, 8, 8))
    with pytest.raises(InputError, match="batch size 0"):
        verify(model, path, example(2, 3, 8, 8), batch_sizes=[0])
    with pytest.raises(InputError, match="hold no sample"):
        verify(model, path, np.zeros((0, 3, 8, 8), "float32"))
    with pytest.raises(SurgeryError, match="does not run on the inputs"):
        verify(model, path, example(2, 4, 8, 8))


def test_a_form_that_mixes_up_repeated_samples_is_found_out() -> None:
    form = Form("shifted", lambda: lambda inputs: [np.roll(inputs[0], 2, axis=0)])
    report = compare_forms(lambda inputs: inputs, [form], [np.ones((2, 3))], batch_sizes=(17,), tolerance=1e-4)
    assert not report.passed


def logistic(rounds: int) -> Run:
    """A chaotic map: what rounding does to x grows by 2 in every round on the average."""

    def run(inputs: Arrays) -> Arrays:
        x = inputs[0]
        for _ in range(rounds):
            x = np.float32(4) * x * (np.float32(1) - x)
        return [x]

    return run


# At worst it grows by 4 in a round: in 8 from 6e-8, the last place of float32, to 4e-3, in 60 to all there is.
@pytest.mark.parametrize(("rounds", "passes", "noisy"), [(4, True, False), (8, True, True), (60, False, True)])
def test_rounding_that_a_model_multiplies_is_told_from_what_is_wrong(rounds: int, passes: bool, noisy: bool) -> None:
    x = np.random.default_rng(0).uniform(0.1, 0.9, (3, 200)).astype("float32")
    # The same in another order: rounded otherwise.
    form = Form("rounded", lambda: lambda inputs: logistic(rounds - 1)([4 * inputs[0] - 4 * inputs[0] ** 2]))
    wrong = Form("wrong", lambda: lambda inputs: logistic(rounds - 1)(logistic(1)([inputs[0] * np.float32(1.01)])))
    looked: list[Arrays] = []

    def look(inputs: Arrays) -> list[Written]:
        looked.append(inputs)
        return []

    report = compare_forms(logistic(rounds), [form, wrong], [x], batch_sizes=[3], tolerance=1e-4, adapt=True, look=look)
    # Where nothing is proven, no layer is to blame.
    assert bool(looked) == (rounds < 60)
    assert [row.passed for row in report.rows] == [passes, False]
    assert (report.noise is not None) == noisy
    words = {True: "may be off by 8 times that", False: "prove nothing"}[passes]
    assert (words in str(report)) == noisy
    if noisy and passes:
        assert report.rows[0].tolerance > 1e-4
        assert report.noise is not None
        assert report.rows[0].tolerance == pytest.approx(8 * report.noise)
    # Without leave to adapt, the tolerance stands.
    strict = compare_forms(logistic(rounds), [form], [x], batch_sizes=[3], tolerance=1e-4)
    assert strict.passed == (rounds == 4)
    assert strict.noise is None


def test_shaking_moves_every_float_by_one_unit_in_the_last_place() -> None:
    array = np.array([[1.0, -2.5, 0.0, np.inf, 3e38], [np.nan, 1e-3, 7.0, -1e9, 0.5]], "float32")
    moved = shaken(array)
    finite = np.isfinite(array)
    assert moved.dtype == array.dtype
    for one, other in zip(array[finite], moved[finite], strict=True):
        beside = {np.nextafter(one, np.float32(np.inf)), np.nextafter(one, np.float32(-np.inf))}
        assert other in beside
    np.testing.assert_array_equal(moved[~finite], array[~finite])
    assert np.isfinite(shaken(np.full(100, np.finfo("float32").max))).all()
    indices = np.arange(3)
    assert shaken(indices) is indices


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    class Net(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, later: paddle.Tensor, earlier: paddle.Tensor) -> dict[str, object]:
            return {"z": later * 2 + self.linear(earlier), "a": [later - earlier, earlier.sum()]}

    specs = [InputSpec([None, 4], "float32", "z"), InputSpec([None, 4], "float32", "a")]
    assert export(Net(), tmp_path / "net", specs).verification.passed


def test_live_results_are_those_of_eval(exported: tuple[nn.Layer, Path]) -> None:
    model, path = exported
    x = example(2, 3, 8, 8)
    program = paddle.jit.load(str(path))
    program.eval()
    np.testing.assert_allclose(program(x).numpy(), evaluate(model, x), rtol=1e-5, atol=1e-6)  # float32, folded
