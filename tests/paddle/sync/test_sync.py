"""Worlds of 2, 3 and 4 processes compute what one process computes on their batches put together."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
import paddle
import pytest
from cluster import run_world
from sync_cases import CASES, STEPS
from train_worker import FAR, make_model, model_batch

import flatwater.paddle as fw

WORLDS = (2, 3, 4)
# Relative to the largest value of a result: 1e-6 is 16 roundings to float32. bfloat16 rounds to 2^-9, and its
# parameters, sums and statistics stay float32.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2.0**-8}

Results: TypeAlias = list[dict[str, np.ndarray]]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} processes")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("world")
    ended = run_world(request.param, "train_worker.py", folder)
    assert [one.status for one in ended] == [0] * request.param, "\n".join(one.output for one in ended)
    return [dict(np.load(Path(folder) / f"{rank}.npz")) for rank in range(request.param)]


@pytest.mark.parametrize("road", ["", "operators "], ids=["kernels", "operators"])
@pytest.mark.parametrize("name", CASES)
def test_a_world_equals_one_process_on_the_whole_batch(results: Results, name: str, road: str) -> None:
    case = CASES[name]
    expected = case.expected(len(results))
    for step in range(STEPS):
        found = [{key: rank[f"{road}{name}: {step} {key}"] for key in expected[step]} for rank in results]
        for key, whole in expected[step].items():
            parts = [rank[key] for rank in found]
            if key in ("mean", "variance"):
                for part in parts:  # the same bits everywhere
                    np.testing.assert_array_equal(part, parts[0])
                together = parts[0]
            else:
                together = sum(parts) if key in ("dweight", "dbias") else np.concatenate(parts)
            tolerance = TOLERANCE["float32" if key in ("mean", "variance") else case.dtype]
            worst = np.abs(together - whole).max() / np.abs(whole).max()
            assert worst <= tolerance, f"step {step}, {key}: off by {worst:.3g}"


def test_each_rank_has_its_share_of_the_results(results: Results) -> None:
    shapes = [rank["an empty rank: 0 y"].shape for rank in results]
    assert shapes == [(share, 5, 4, 6) for share in CASES["an empty rank"].shares[: len(results)]]


def test_one_collective_per_direction_whose_size_is_that_of_the_layer(results: Results) -> None:
    for rank in results:
        assert (rank["forward"], rank["both"], rank["eval"]) == (1, 2, 0)
        # For every world: 2·5 sums, forward the count, and 4 marks; a message is that and its length, once a round.
        assert rank["sizes"].tolist() == [15, 14]
        assert set(rank["sent"].tolist()) == {8 * 16, 8 * 15}
        assert rank["sent"].size <= 2 * 2
        assert rank["operators' sizes"].tolist() == [15, 15]  # the gradient of the count travels along


def test_data_parallel_averages_to_the_gradient_of_the_mean_loss(results: Results) -> None:
    model = make_model(fw.BatchNorm2D)
    model(paddle.to_tensor(model_batch(len(results)))).square().mean().backward()
    expected = {i: p.grad.numpy() for i, p in enumerate(model.parameters()) if not p.stop_gradient}
    scale = max(np.abs(gradient).max() for gradient in expected.values())
    for rank in results:
        for index, gradient in expected.items():
            # A few hundred float32 products and sums of Paddle's convolutions, in another order.
            assert np.abs(rank[f"gradient {index}"] - gradient).max() <= 1e-5 * scale


def test_data_parallel_of_unequal_shares_far_from_zero(results: Results) -> None:
    expected = FAR.expected(len(results))[0]
    for index, rank in enumerate(results):
        mine = FAR.slices(len(results))[index]
        for key in ("dx", "dweight", "dbias"):
            whole = expected[key]
            found, wanted = rank[f"unequal {key}"], whole[mine] if key == "dx" else whole
            # 16 roundings to float32, of the largest value of all ranks.
            assert np.abs(found - wanted).max(initial=0.0) <= TOLERANCE["float32"] * np.abs(whole).max(), key


def test_what_is_captured_without_its_whole_graph_computes_the_same(results: Results) -> None:
    for rank in results:
        for key in ("mean", "gradient"):
            # The same kernels on the same numbers; the framework's own operators may be fused in another order.
            np.testing.assert_allclose(rank[f"captured {key}"], rank[f"eager {key}"], rtol=1e-5, atol=1e-6)


def test_a_single_value_on_all_ranks_passes_through_where_that_is_asked_for(results: Results) -> None:
    for index, rank in enumerate(results):
        np.testing.assert_array_equal(rank["single y"], np.zeros((int(index == 0), 2)))  # relu of -3
        np.testing.assert_array_equal(rank["single mean"], [0.0, 0.0])
        assert "got 1 values per channel on ranks" in str(rank["single error"])
        assert "single_value='passthrough'" in str(rank["single error"])


def test_bfloat16_statistics_are_read_as_numbers(results: Results) -> None:
    for rank in results:
        # Two digits and a half is what bfloat16 holds.
        np.testing.assert_allclose(rank["bfloat16 averaged"], [(len(results) - 1) / 2] * 2, rtol=2.0**-8)
        np.testing.assert_allclose(rank["bfloat16 moving"], [0.9 * 3 + 0.1 * 5, 0.9 * 3 + 0.1 * 2], rtol=2.0**-8)


def test_fit_evaluates_and_saves_the_statistics_of_all_ranks(results: Results) -> None:
    for rank in results:
        np.testing.assert_array_equal(rank["fit evaluated"], results[0]["fit evaluated"])
        np.testing.assert_array_equal(rank["fit end"], results[0]["fit end"])
    first, second = results[0]["fit evaluated"]
    assert (first != second).all()  # training went on in between
    np.testing.assert_array_equal(results[0]["fit saved"], [first, second, results[0]["fit end"]])


def test_a_second_derivative_is_refused(results: Results) -> None:
    for rank in results:
        assert "InputError: SyncBatchNorm" in str(rank["second derivative"])
        assert "differentiated again" in str(rank["second derivative"])


def test_the_transport_of_devices_sums_in_float64(results: Results) -> None:
    world = len(results)
    for rank in results:
        np.testing.assert_allclose(rank["device sum"], [world, world * (world - 1) / 2, world * 1e-9], rtol=1e-15)


def test_a_group_shares_among_its_own_ranks(results: Results) -> None:
    for index, rank in enumerate(results):
        members = (0, 1) if index < 2 else tuple(range(2, len(results)))
        mean = np.mean([value for member in members for value in (member, member, 4)])
        np.testing.assert_allclose(rank["group mean"], [0.1 * mean], rtol=1e-6)


def test_a_layer_may_run_twice_and_be_recomputed(results: Results) -> None:
    layer = fw.BatchNorm2D(3)
    draws = [np.random.default_rng(rank) for rank in range(len(results))]
    batches = [draw.standard_normal((4, 3, 2, 2)).astype("float32") for draw in draws]
    x = paddle.to_tensor(np.concatenate(batches))
    x.stop_gradient = False
    layer(layer(x)).square().sum().backward()
    for found, expected in zip(results, np.split(x.grad.numpy(), len(results)), strict=True):
        # Σ y² of normalized values hardly depends on x: the gradient is what rounding leaves of terms of size 1.
        assert np.abs(found["twice"] - expected).max() <= 1e-4
        np.testing.assert_allclose(found["twice mean"], layer._mean.numpy(), rtol=1e-5, atol=1e-7)


def test_statistics_are_averaged_as_a_mixture(results: Results) -> None:
    for layer in range(2):
        means, variances = (
            np.array([rank[f"own {layer} {key}"] for rank in results], np.float64) for key in ("_mean", "_variance")
        )
        assert np.ptp(means, axis=0).max() > 0.01  # there was something to average
        expected = means.mean(axis=0), (variances + (means - means.mean(axis=0)) ** 2).mean(axis=0)
        for rank in results:
            for key, value in zip(("_mean", "_variance"), expected, strict=True):
                np.testing.assert_allclose(rank[f"averaged {layer} {key}"], value, rtol=1e-6)
                np.testing.assert_array_equal(rank[f"averaged {layer} {key}"], results[0][f"averaged {layer} {key}"])


def test_a_converted_model_trains_on_and_stays_equal_on_all_ranks(results: Results) -> None:
    trained = [name for name in results[0] if name.startswith("trained ")]
    assert len(trained) == 12
    for rank in results[1:]:
        for name in trained:
            np.testing.assert_array_equal(rank[name], results[0][name])
