"""The arithmetic of the benchmarks, and that what they measure is what models have. Nothing here is timed."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import paddle
import pytest
from benchmarks import accuracy, kernels, layers, machine, memory, report, round_trip, shapes, tables, timing
from benchmarks.hard_data import CASES, hard_case, read_case, write_case
from paddle.vision import models
from rich.console import Console, RenderableType

from flatwater import reference
from flatwater.recipes.ocr.config import ModelConfig, NormConfig
from flatwater.recipes.ocr.model import Recognizer

# --- Shapes ------------------------------------------------------------------------------------------


def recognizer() -> paddle.nn.Layer:
    return Recognizer(ModelConfig(), NormConfig(), classes=10)


@pytest.mark.parametrize(
    ("name", "build", "image"),
    [
        ("resnet50", models.resnet50, (3, 224, 224)),
        ("mobilenetv3", models.mobilenet_v3_large, (3, 224, 224)),
        ("flatwater-ocr", recognizer, (1, 32, 320)),
    ],
)
def test_shapes_are_what_the_models_normalize(
    name: str, build: Callable[[], paddle.nn.Layer], image: tuple[int, ...]
) -> None:
    seen: dict[tuple[int, ...], None] = {}

    def note(_: paddle.nn.Layer, inputs: tuple[paddle.Tensor, ...]) -> None:
        seen[tuple(inputs[0].shape[1:])] = None

    model = build()
    model.eval()
    for layer in model.sublayers():
        if isinstance(layer, paddle.nn.BatchNorm | paddle.nn.BatchNorm2D):
            layer.register_forward_pre_hook(note)
    with paddle.no_grad():
        model(paddle.zeros([1, *image]))

    assert [shape[1:] for shape in shapes.MODELS[name]] == list(seen)


def test_a_shape_of_two_models_is_measured_once_and_names_both() -> None:
    found = [case for case in shapes.cases() if case.shape == (32, 64, 56, 56)]
    assert [case.models for case in found] == [("resnet50", "mobilenetv3")]


def test_quick_shapes_are_among_the_models() -> None:
    assert {case.shape for case in shapes.cases(quick=True)} == set(shapes.QUICK)


# --- Numbers -----------------------------------------------------------------------------------------


def test_quartiles_leave_out_what_is_no_number() -> None:
    assert timing.Quartiles.of(np.array([3.0, 1.0, np.nan, 2.0])) == timing.Quartiles(1.5, 2.0, 2.5)
    assert math.isnan(timing.Quartiles.of(np.array([1.0, np.nan, np.nan])).median)


def test_a_ratio_and_its_inverse_cancel() -> None:
    assert timing.geometric_mean([4.0, 0.25, math.nan]) == pytest.approx(1.0)
    assert math.isnan(timing.geometric_mean([]))


def test_every_round_begins_with_another_contender_and_samples_last_long_enough() -> None:
    asked: list[tuple[str, int]] = []

    def contender(name: str, milliseconds: float) -> timing.Timer:
        def sample(repeats: int) -> float:
            asked.append((name, repeats))
            return milliseconds

        return sample

    times = timing.rounds({"slow": contender("slow", 50.0), "fast": contender("fast", 4.0)}, 2)

    assert {name: list(values) for name, values in times.items()} == {"slow": [50.0, 50.0], "fast": [4.0, 4.0]}
    assert asked[-4:] == [("slow", 1), ("fast", 5), ("fast", 5), ("slow", 1)]


def test_steps_are_taken_until_their_page_faults_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"grows": [900, 700, 0, 0], "steady": [50], "never": list(range(0, 10000, 100))}
    taken = dict.fromkeys(costs, 0)
    faults = 0

    def step(name: str) -> None:
        nonlocal faults
        faults += costs[name][min(taken[name], len(costs[name]) - 1)]
        taken[name] += 1

    monkeypatch.setattr(timing, "page_faults", lambda: faults)
    timing.settle([partial(step, name) for name in costs])
    # The second time as well, each needs two alike.
    assert taken == {"grows": 4 + 2, "steady": 2 + 2, "never": 2 * timing.MOST_TO_SETTLE}


@pytest.mark.parametrize(
    ("activation", "residual", "copies"),
    [("relu", False, 2.5), ("none", False, 2.5), ("none", True, 3.5), ("relu", True, 4.0), ("hardswish", True, 4.0)],
)
def test_the_floor_counts_passes(activation: kernels.Activation, residual: bool, copies: float) -> None:
    assert kernels.copies(activation, residual=residual) == copies


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (4, 16, 9, 3)])
def test_memory_begins_at_a_cache_line(shape: tuple[int, ...]) -> None:
    array = kernels.aligned(shape)
    assert (array.shape, array.dtype, array.ctypes.data % 64) == (shape, np.float32, 0)
    assert array.flags.c_contiguous


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_the_step_that_is_timed_is_batch_norm(layout: str) -> None:
    tensors = kernels.Tensors((3, 5, 4, 2), layout)
    tensors.step("relu", residual=True)()
    arrays, axis = tensors.arrays, -1 if layout == "NHWC" else 1
    given = {"activation": "relu", "residual": arrays["residual"], "axis": axis}
    # float32: a few roundings of values around 1.
    np.testing.assert_allclose(arrays["y"], reference.batch_norm(arrays["x"], **given).y, atol=1e-5)
    exact = reference.batch_norm_gradients(arrays["dy"], arrays["x"], **given)
    np.testing.assert_allclose(arrays["dx"], exact.x, atol=1e-5)
    np.testing.assert_allclose(arrays["dresidual"], exact.residual, atol=1e-5)


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_so_is_that_of_group_norm(layout: str) -> None:
    tensors = kernels.Tensors((3, 8, 4, 2), layout)
    tensors.group_step(4)()
    arrays, axis = tensors.arrays, -1 if layout == "NHWC" else 1
    np.testing.assert_allclose(arrays["y"], reference.group_norm(arrays["x"], 4, axis=axis).y, atol=1e-5)
    exact = reference.group_norm_gradients(arrays["dy"], arrays["x"], 4, axis=axis)
    np.testing.assert_allclose(arrays["dx"], exact.x, atol=1e-5)


def test_a_norm_is_what_it_adds_to_its_graph() -> None:
    case = shapes.Case((2, 3, 4, 5), ("a model",))
    times = {
        "tuned paddle NCHW bare+residual": [5.0, 5.0, 5.0],
        "tuned paddle NCHW relu+residual flatwater": [6.0, 6.0, 6.0],
        "tuned paddle NCHW relu+residual stock": [9.0, 9.0, 9.0],
        "tuned paddle NCHW bare": [1.0, 2.0, 3.0],
        "tuned paddle NCHW relu flatwater": [2.0, 3.0, 4.0],
        "tuned paddle NCHW relu stock": [4.0, 5.0, 6.0],
        "tuned torch contiguous bare": [1.0, 1.0, 1.0],
        "tuned torch contiguous relu": [3.0, 3.0, 3.0],
        "tuned torch channels_last bare": [2.0, 2.0, 2.0],
        "tuned torch channels_last relu": [2.5, 2.5, 1.0],
    }
    arrays = {name: np.array(values) for name, values in times.items()}

    row, added = layers.rows_of(case, arrays, ["NCHW"], ["relu", "relu+residual"], ["tuned"])

    assert {name: ratio.median for name, ratio in added.ratios.items()} == {"paddle": 4.0}

    medians = {name: ratio.median for name, ratio in row.ratios.items()}
    assert medians == {"paddle": 3.0, "contiguous": 2.0, "channels_last": 0.5, "better torch": 0.5}
    assert row.slower_than == ["channels_last", "better torch"]
    found = layers.summarize([row, added])
    held = {summary.contender: summary.holds for summary in found if summary.norm == "relu"}
    assert held == {"paddle": True, "contiguous": True, "channels_last": False, "better torch": False}
    (fused,) = (summary for summary in found if (summary.norm, summary.contender) == (layers.FUSED, "paddle"))
    assert (fused.tensors, fused.geometric_mean) == (2, pytest.approx(math.sqrt(12)))


def test_saved_memory_is_counted_in_tensors() -> None:
    assert memory.Peak("8", "scale", "relu", 1, tensor=100, stock=500, flatwater=400).holds
    assert not memory.Peak("8", "scale", "relu", 4, tensor=100, stock=900, flatwater=600).holds
    assert memory.Peak("8", "conv", "relu", 1, tensor=100, stock=500, flatwater=500).saved == 0.0
    assert memory.Peak("8", "scale", "relu+residual", 4, tensor=100, stock=500, flatwater=500).holds
    assert not memory.Peak("8", "scale", "none+residual", 4, tensor=100, stock=500, flatwater=502).holds


def test_only_faults_beyond_the_graphs_own_count() -> None:
    row = memory.Faults("8", "NCHW", "default", bare=1000.0, stock=2000.0, flatwater=1000.5)
    assert (row.own, row.holds) == (0.5, True)


def test_infinity_is_right_where_float32_ends_and_wrong_elsewhere() -> None:
    exact = np.array([3.0, 4.0, 1e39])
    infinite = np.array([3.0, 4.0, np.inf], np.float32)
    assert accuracy.errors(infinite, exact) == (0.0, 0.0)
    assert math.isnan(accuracy.errors(np.array([3.0, np.inf, np.inf], np.float32), exact)[0])
    rms, largest = accuracy.errors(np.array([3.0, 5.0], np.float32), exact[:2])
    assert (rms, largest) == (pytest.approx(math.sqrt(1 / 25)), 0.25)


@pytest.mark.parametrize("name", CASES)
def test_hard_data_travels_unchanged(name: str, tmp_path: Path) -> None:
    case = hard_case(name, seed=1)
    write_case(tmp_path / "case.npz", case)
    back = read_case(tmp_path / "case.npz")
    assert all(np.array_equal(left, right) for left, right in zip(case, back, strict=True))
    assert case.epsilon <= 1e-5


def test_the_environments_differ_in_flatwaters_settings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_TOP_PAD_", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tuned, default = machine.tuned_environment(), machine.default_environment()
    assert tuned["OMP_NUM_THREADS"] == "1"  # the user's
    assert "OMP_NUM_THREADS" not in default
    assert {name: tuned[name] for name in default} == default


# --- Tables ------------------------------------------------------------------------------------------


def printed(tables: list[RenderableType]) -> str:
    console = Console(width=100, file=io.StringIO(), record=True)
    for table in tables:
        console.print(table)
    text = console.export_text()
    assert "…" not in text  # nothing is cut off
    return text


def ratios(median: float) -> timing.Quartiles:
    return timing.Quartiles(median - 0.1, median, median + 0.1)


def test_what_misses_its_limit_is_marked_and_nothing_else() -> None:
    def row(shape: str, size: str, norm: str, ratio: float) -> kernels.Row:
        given = (("a model",), size, 30.0, "NCHW", norm, False, "float32", 2.5, ratios(2.0), ratios(2 * ratio))
        return kernels.Row(shape, *given, ratios(ratio), ratios(ratio / 2))

    rows = [row("1x2x3x4", "large", "relu", 1.2), row("5x6x7x8", "small", "relu", 2.5), row("9", "tiny", "relu", 7.0)]
    summaries = [asdict(summary) | {"holds": summary.holds} for summary in kernels.summarize(rows)]
    text = printed(report.kernels({"rows": [asdict(row) for row in rows], "summaries": summaries, "others": 0.0}))

    assert [line.split()[0] for line in text.splitlines() if "!" in line] == ["5x6x7x8", "1–25"]
    assert "measure again" not in text


def test_samples_norms_have_no_yardstick_of_eight_passes() -> None:
    shape = shapes.Case((2, 8, 4, 4), ("a model",))
    result = kernels.measure([shape], activations=(), others=("group", "instance"), count=1, progress=lambda _: None)
    found = {(row["layout"], row["norm"]): row["streaming"] is not None for row in result["rows"]}
    assert found == {(layout, norm): layout == "NCHW" for layout in shapes.LAYOUTS for norm in ("group", "instance")}
    assert "streaming: eight" not in printed(report.kernels(result))


def test_layers_fit_the_terminal_and_mark_where_ours_is_slower() -> None:
    contenders = ("paddle", "contiguous", "channels_last", "onednn", "better torch")
    rows = [
        layers.Row(
            "32x1024x14x14",
            ("a model",),
            environment,
            layout,
            "hardswish",
            dict.fromkeys(("flatwater", *contenders), ratios(123.4)),
            dict.fromkeys(contenders, ratios(12.34)) | {"onednn": ratios(0.87)},
        )
        for environment in ("tuned", "default")
        for layout in shapes.LAYOUTS
    ]
    summaries = [asdict(summary) | {"holds": summary.holds} for summary in layers.summarize(rows)]
    text = printed(report.layers({"rows": [asdict(row) for row in rows], "summaries": summaries, "others": 0.5}))

    assert "…" not in text
    assert text.count("0.87!") == 16  # two environments, two layouts: in the row, at its foot, in both summaries
    assert "measure again" in text


@pytest.mark.parametrize(
    ("trips", "said"),
    [
        ([], ""),
        ([math.nan], ""),
        ([250.0, 300.0, math.nan], "in 250 to 300 ns"),
        ([250.0, 400.0], "in 250 to 400 ns: [bold]moved apart[/]"),
    ],
)
def test_processors_that_are_moved_apart_are_noticed(trips: list[float], said: str) -> None:
    text = tables.busy({"others": 0.0, "round_trips": trips})
    assert said in text
    assert ("moved apart" in text) == ("moved apart" in said)
    assert ("a byte" in text) == bool(said)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="pins processes to processors")
def test_a_byte_goes_to_another_processor_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    trip = round_trip.round_trip()
    # Its processors may be taken by others for longer than it waits.
    assert math.isnan(trip) or trip > 0
    if len(os.sched_getaffinity(0)) == 1:
        assert math.isnan(trip)
    monkeypatch.setattr(round_trip, "LONGEST", 0.001)
    assert math.isnan(round_trip.round_trip())


def test_an_error_that_is_not_the_smallest_is_marked() -> None:
    best = accuracy.Row("ordinary", "y", {"flatwater": 1e-8, "paddle": math.nan}, {})
    worse = accuracy.Row("ordinary", "dx", {"flatwater": 2e-8, "paddle": 1e-8}, {})
    rows = [asdict(row) | {"best": row.best} for row in (best, worse)]
    text = printed(report.accuracy({"rows": rows, "bits": [{"shape": [1, 2], "layout": "NCHW", "same": True}]}))
    assert "2.0e-08!" in text
    assert "1.0e-08!" not in text
    assert "are the same" in text
