"""Accumulated statistics on several ranks: synchronised norms pool over those that share them, plain ones do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from accumulate_worker import micro_batches
from cluster import run_world

from flatwater import reference


def test_synchronised_norms_pool_over_their_ranks(tmp_path: Path) -> None:
    for ended in run_world(3, "accumulate_worker.py", "pool", tmp_path):
        assert ended.status == 0, ended.output
    parts = [np.concatenate(micro_batches(rank)) for rank in range(3)]
    for rank in range(3):
        found = np.load(tmp_path / f"{rank}.npz")
        groups = [parts, parts[:2] if rank < 2 else parts[2:], [parts[rank]]]
        assert found["counts"].tolist() == [sum(map(len, group)) for group in groups]
        for index, group in enumerate(groups):
            whole = reference.batch_statistics(np.concatenate(group))
            mean, variance = reference.update_running(np.zeros(3), np.ones(3), whole)
            # One rounding to float32 of what was summed in float64.
            np.testing.assert_allclose(found[f"{index}._mean"], mean, rtol=2.0**-23)
            np.testing.assert_allclose(found[f"{index}._variance"], variance, rtol=2.0**-23)


def test_a_rank_that_does_not_come_to_the_end_ends_the_others() -> None:
    first, second = run_world(2, "accumulate_worker.py", "fail", ".")
    assert first.status == second.status == 0, first.output + second.output
    assert "rank 1: gave up" in second.output
    assert "rank 0: DistributedError: average of accumulate_statistics, means of 1 layers" in first.output
