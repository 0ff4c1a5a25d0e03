"""Recalibration and freezing on several ranks: gloo processes that have to agree to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cluster import run_world
from surgery_worker import batches_of

from flatwater import reference


def pooled(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    found = reference.batch_statistics(np.concatenate(parts))
    return found.mean, found.variance


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_get_the_statistics_of_all_their_data(size: int, tmp_path: Path) -> None:
    for ended in run_world(size, "surgery_worker.py", "recalibrate", tmp_path):
        assert ended.status == 0, ended.output
    ranks = [np.load(tmp_path / f"{rank}.npz") for rank in range(size)]
    for other in ranks[1:]:
        assert all(ranks[0][name].tobytes() == other[name].tobytes() for name in ranks[0].files)

    batches = [batch for rank in range(size) for batch in batches_of(rank)]
    normalized = [np.maximum(reference.batch_norm(batch).y, 0) for batch in batches]
    everything = reference.batch_statistics(np.concatenate(batches))
    in_order = [np.maximum(reference.batch_norm(batch, statistics=everything).y, 0) for batch in batches]
    for name, second in (("by_batch", normalized), ("in_order", in_order)):
        assert ranks[0][f"{name}.counts"].tolist() == [26, 26]
        for layer, inputs in (("0", batches), ("2", second)):
            for key, value in zip(("_mean", "_variance"), pooled(inputs), strict=True):
                # float32: what the second layer reads was computed in it
                np.testing.assert_allclose(ranks[0][f"{name}.{layer}.{key}"], value, rtol=1e-5, atol=1e-6)
    assert ranks[0]["in_order.passes"] == 2

    whole = np.concatenate([batches_of(rank % 2)[0] for rank in range(size)])
    second = np.maximum(reference.batch_norm(whole).y, 0)
    np.testing.assert_allclose(ranks[0]["synchronised.2._variance"], pooled([second])[1], rtol=1e-5, atol=1e-6)


def test_what_fails_on_one_rank_fails_on_all() -> None:
    first, second = run_world(2, "surgery_worker.py", "fail", ".")
    assert first.status == second.status == 0, first.output + second.output
    assert "rank 0: DistributedError: pass 1 of 1 failed on 1 of the other ranks of [0, 1]" in first.output
    assert "rank 1: InputError: batch norm layer '0', in batch 2, reads values that are NaN" in second.output
    assert "rank 0: recalibrated" in first.output


def test_frozen_parameters_and_the_reducer() -> None:
    for ended in run_world(2, "surgery_worker.py", "freeze", "."):
        assert ended.status == 0, ended.output
        assert ": frozen" in ended.output
