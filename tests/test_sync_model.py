"""The model of the collectives: formulas by hand, fits that find what was put in, and maxima that are known."""

from __future__ import annotations

import io
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from benchmarks import sync
from benchmarks.__main__ import command
from benchmarks.sync_model import ALGORITHMS, Network, fit, messages, simulate, step_seconds
from benchmarks.sync_report import sync as tables
from benchmarks.timing import Quartiles
from click.testing import CliRunner
from rich.console import Console

NETWORK = Network(latency=10.0, bandwidth=2.0)  # a message of 8 bytes takes 14


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (2, {"recursive doubling": 14, "tree": 28, "halving, doubling": 24, "ring": 24}),
        (4, {"recursive doubling": 28, "tree": 56, "halving, doubling": 46, "ring": 66}),
        # 2 rounds among four of the five, and a message before and behind.
        (5, {"recursive doubling": 56, "tree": 84, "halving, doubling": 74, "ring": 8 * (10 + 0.8)}),
        (8, {"recursive doubling": 42, "tree": 84, "halving, doubling": 67, "ring": 14 * 10.5}),
    ],
)
def test_all_reduces_by_hand(ranks: int, expected: dict[str, float]) -> None:
    assert {name: reduce(ranks, 8, NETWORK) for name, reduce in ALGORITHMS.items()} == pytest.approx(expected)


def test_only_the_ring_grows_with_the_ranks_rather_than_with_their_logarithm() -> None:
    growth = {name: reduce(1024, 8, NETWORK) / reduce(2, 8, NETWORK) for name, reduce in ALGORITHMS.items()}
    assert growth["recursive doubling"] == growth["tree"] == pytest.approx(10)
    assert growth["ring"] > 800


def test_long_vectors_are_another_matter() -> None:
    size = 1e9
    doubling, halving = (ALGORITHMS[name](64, size, NETWORK) for name in ("recursive doubling", "halving, doubling"))
    assert doubling / halving == pytest.approx(6 / (2 * 63 / 64), rel=1e-6)


def test_a_step_has_two_sums_for_each_layer() -> None:
    sizes = [8 * (2 * 3 + 6), 8 * (2 * 3 + 5), 8 * (2 * 64 + 6), 8 * (2 * 64 + 5)]
    expected = math.fsum(messages(4) * NETWORK.message(size) for size in sizes)
    assert step_seconds([3, 64], 4, NETWORK) == pytest.approx(expected)


def test_a_fit_finds_the_network_behind_exact_times() -> None:
    network = Network(latency=2e-5, bandwidth=3e9)
    sizes = np.array([8.0, 512.0, 1e4, 5e5])
    found = fit(sizes, np.array([network.message(size) for size in sizes]))
    assert (found.latency, found.bandwidth) == pytest.approx((2e-5, 3e9))


def test_a_fit_is_not_decided_by_the_longest_message_alone() -> None:
    sizes, network = np.array([8.0, 64.0, 512.0, 1e6]), Network(2e-5, 1e9)
    seconds = np.array([network.message(size) for size in sizes])
    seconds[-1] *= 1.3
    assert fit(sizes, seconds).latency == pytest.approx(2e-5, rel=0.01)


@pytest.mark.parametrize(("sizes", "seconds"), [([8.0, 8.0], [1.0, 1.0]), ([8.0, 800.0], [2.0, 1.0])])
def test_times_that_say_nothing_of_a_network_are_refused(sizes: list[float], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="measure"):
        fit(np.array(sizes), np.array(seconds))


def test_one_rank_waits_for_nobody() -> None:
    alone = simulate(np.array([1.0, 2.0]), np.array([0.3, 0.1]), 1)
    assert alone.waiting == alone.added == 0.0
    # 200 draws of a deviation of 0.32.
    assert alone.alone == pytest.approx(3.0, abs=4 * 0.32 / math.sqrt(200))


def test_the_maximum_of_two_is_known() -> None:
    """E max = μ + σ/√π for two normal draws, which a log-normal of a small deviation nearly is."""
    found = simulate(np.array([1.0]), np.array([0.01]), 2, draws=4000)
    assert found.each == found.once
    # The deviation of a maximum is below σ; 4000 draws.
    assert found.each - 1.0 == pytest.approx(0.01 / math.sqrt(math.pi), abs=4 * 0.01 / math.sqrt(4000))


def test_independent_parts_make_waiting_each_time_dearer_than_once() -> None:
    """Σ max grows like k·σ with k parts of deviation σ, max Σ like √k·σ."""
    parts = np.full(100, 1.0), np.full(100, 0.01)
    found = simulate(*parts, 64)
    assert found.each > found.once > found.alone
    assert (found.each - 100) / (found.once - 100) == pytest.approx(10, rel=0.2)


def test_the_same_seed_draws_the_same() -> None:
    parts = np.array([1.0, 2.0]), np.array([0.1, 0.2])
    assert simulate(*parts, 8) == simulate(*parts, 8)
    assert simulate(*parts, 8) != simulate(*parts, 8, seed=1)


# --- From measurements to tables ---------------------------------------------------------------------


def quartiles(median: float) -> Quartiles:
    return Quartiles(median, median, median)


def step(ranks: int) -> sync.Step:
    times = (quartiles(100.0), quartiles(112.0), quartiles(1.12), quartiles(6.0))
    return sync.Step(ranks, "a model", (64, 64), *times, means=(1.0, 0.0, 1.0), deviations=(0.0, 0.0, 0.1))


def printed(document: dict[str, Any]) -> str:
    console = Console(width=100, file=io.StringIO(), record=True)
    for table in tables(document):
        console.print(table)
    return console.export_text()


def result() -> dict[str, Any]:
    """What ``measure`` returns, of times that were thought up."""
    sums = [
        sync.Sum(ranks, length, quartiles((20 + length / 100) * 1e-3), quartiles(0.3), quartiles(10.0))
        for ranks in sync.WORLDS
        for length in (1, 100)
    ]
    late = sync.LateSum(8, 3, delay=1.0, predicted=3.1, measured=quartiles(3.41))
    return sync.summary([step(ranks) for ranks in sync.WORLDS], sums, given=Network(30e-6, 1.25e9)) | {
        "late": [asdict(late) | {"ratio": late.ratio}],
        "others": 0.0,
    }


def test_the_network_is_that_of_the_fewest_ranks() -> None:
    sums = [
        sync.Sum(ranks, length, quartiles(ranks * (20 + 8e-3 * (length + 5)) * 1e-3), quartiles(1.0), quartiles(1.0))
        for ranks in (2, 4)
        for length in (1, 1000)
    ]
    found = sync.network_of(sums, 2)
    assert (found.latency, found.bandwidth) == pytest.approx((40e-6, 5e8))


def test_a_check_adds_messages_and_waiting() -> None:
    network = Network(50e-6, 1e9)
    (found,) = sync.check([step(2)], network)
    assert found.messages == pytest.approx(step_seconds((64, 64), 2, network) * 1e3)
    assert found.waiting == pytest.approx(0.1 / math.sqrt(math.pi), rel=0.25)  # of a maximum of 2, in 200 draws
    assert found.ratio == pytest.approx(6.0 / (found.messages + found.waiting))


def test_a_projection_knows_all_networks_and_says_that_it_is_none() -> None:
    document = result()
    assert [row["ranks"] for row in document["projections"]] == list(sync.PROJECTED)
    assert set(document["projections"][0]["sums"]) == {"loopback", "assumed", "given"}
    text = printed(document)
    assert text.count("Predicted, not measured") == 3
    assert "α = 30.0 µs, B = 1.25 GB/s: yours" in text
    assert "…" not in text
    assert ["8", "3", "1.00", "3.10", "3.41", "1.10"] in [line.split() for line in text.splitlines()]


def test_more_ranks_than_processors_are_said_to_be() -> None:
    text = printed(result() | {"processors": 2})
    lines = [line.split() for line in text.splitlines() if line.lstrip().startswith("a model")]
    assert [line[2:4] for line in lines[:2]] == [["2", "1.0"], ["4", "2.0"]]


def test_half_a_network_is_refused() -> None:
    run = CliRunner().invoke(command, ["sync", "--latency", "30"])
    assert run.exit_code == 2
    assert "give both --latency and --bandwidth" in run.output
