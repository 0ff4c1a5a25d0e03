"""A rank that dies, is missing or is somewhere else ends the others with an error that says so; nobody hangs."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from cluster import run_world

Seen: TypeAlias = dict[str, dict[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each rank of a world of four saw of each fault."""
    folder = tmp_path_factory.mktemp("faults")
    ended = run_world(4, "fault_worker.py", folder)
    assert [one.status for one in ended] == [0, -signal.SIGKILL, 0, 0], "\n".join(one.output for one in ended)
    found: Seen = {}
    for file in Path(folder).iterdir():
        fault, rank, _ = file.name.split(".")
        found.setdefault(fault, {})[int(rank)] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("fault", "ranks", "said"),
    [
        ("other_channels", (0, 1), ("'sync_batch_norm_0' (8 channels", "'sync_batch_norm_0' (9 channels")),
        ("many_other_channels", (2, 3), ("'sync_batch_norm_0' (8 channels", "'sync_batch_norm_0' (400 channels")),
        ("skipped_layer", (0, 2), ("'sync_batch_norm_1'", "'sync_batch_norm_2'", "sum 2")),
        ("other_statistics", (0, 3), ("the ranks came with different things", "call fw.average_statistics(model)")),
        ("other_variance", (0, 1, 2), ("the ranks came with different things", "call fw.average_statistics(model)")),
        ("other_settings", (0, 1, 3), ("epsilon 1e-05, momentum 0.9", "epsilon 0.001, momentum 0.5", "relu")),
    ],
)
def test_ranks_at_different_things_learn_what_the_others_are_at(
    seen: Seen, fault: str, ranks: tuple[int, ...], said: tuple[str, ...]
) -> None:
    assert set(seen[fault]) == set(ranks)
    for rank, report in seen[fault].items():
        assert report["kind"] == "DistributedError", report
        assert f"of rank {rank} in ranks {list(ranks)}" in report["text"]
        for other in set(ranks) - {rank}:
            assert f"rank {other} is in sum" in report["text"]
        assert all(part in report["text"] for part in said), report["text"]


def test_a_missing_rank_is_given_up_when_the_user_says(seen: Seen) -> None:
    report = seen["missing_rank"][1]
    assert report["kind"] == "DistributedError"
    # A quarter of the time is kept for asking the others; a busy machine may be a little late.
    assert re.search(r"a rank did not come, after (1\.[5-9]|2\.\d) s of timeout=2 s", report["text"]), report["text"]
    assert "rank 3 says nothing: it died, or is busy elsewhere" in report["text"]
    assert seen["missing_rank"][3]["kind"] == "none"


def test_only_members_of_a_group_share_in_it(seen: Seen) -> None:
    for rank, report in seen["foreign_group"].items():
        assert report["kind"] == "DistributedError"
        assert f"rank {rank} shares statistics with ranks [{5 - rank}], to which it does not belong" in report["text"]


def test_a_stopped_rank_is_given_up_and_learns_of_it_when_it_goes_on(seen: Seen) -> None:
    waiting, stopped = seen["stopped_rank"][1], seen["stopped_rank"][2]
    assert waiting["kind"] == stopped["kind"] == "DistributedError"
    assert "a rank did not come" in waiting["text"]
    assert "of timeout=4 s" in waiting["text"]
    assert "rank 2 says nothing: it died, or is busy elsewhere" in waiting["text"]
    assert "the connection failed" in stopped["text"]
    assert "rank 1 is in sum 2, forward of SyncBatchNorm 'sync_batch_norm_0'" in stopped["text"]


def test_a_killed_rank_ends_the_others_in_the_middle_of_a_step(seen: Seen) -> None:
    assert set(seen["killed_rank"]) == {0, 2, 3}
    for rank, report in seen["killed_rank"].items():
        assert "DistributedError: backward of SyncBatchNorm 'sync_batch_norm_0' (8 channels), sum 4" in report["text"]
        assert f"of rank {rank} in ranks [0, 1, 2, 3]" in report["text"]
        assert "rank 1 says nothing: it died" in report["text"]
        # Though a process that it had forked lives on, its connections are closed, which tells those at their ends.
        assert "the connection failed" in report["text"]
        assert "a rank did not come" not in report["text"]
        assert report["seconds"] < 60  # the layer's timeout, and this includes the start of the others
