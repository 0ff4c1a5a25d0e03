"""What ranks in trouble tell each other, through the store: who waits where, and who has given up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from flatwater.paddle.lanes import Worker, connect_store

__all__ = ["Reports"]

# How long a rank that knows of a fault waits for the others to say what they saw.
_GRACE = 2.0


class Reports:
    """What ranks in trouble say about themselves, in the store. Never raises, never blocks for long."""

    def __init__(self, ranks: tuple[int, ...], rank: int) -> None:
        self._ranks = ranks
        self._rank = rank
        self._key = f"flatwater/reports/{','.join(map(str, ranks))}"
        self._worker: Worker | None = None
        self._store: Any = None
        self._published: list[Any] = []
        self._read = 0
        self._latest: dict[int, dict[str, Any]] = {}
        self._reachable = True

    def publish(self, call: int, operation: str, fault: str | None = None) -> None:
        report = [call, operation, fault]
        if report != self._published:
            self._published = report
            text = json.dumps({"rank": self._rank, "call": call, "operation": operation, "fault": fault})
            self._do(lambda: self._append(text))

    def contradict(self, call: int, operation: str) -> bool:
        """Whether a rank is at something else, or has given up."""
        self._do(self._refresh)
        return any(
            report["fault"] or (report["call"] == call and report["operation"] != operation)
            for report in self._latest.values()
        )

    def collect(self) -> str:
        """What every other rank said, after giving them time to say it."""
        end = time.monotonic() + _GRACE
        others = [rank for rank in self._ranks if rank != self._rank]
        while time.monotonic() < end and self._reachable and not all(rank in self._latest for rank in others):
            self._do(self._refresh)
            time.sleep(0.05)
        return "; ".join(f"rank {rank} {self._describe(rank)}" for rank in others)

    def _describe(self, rank: int) -> str:
        report = self._latest.get(rank)
        if report is None:
            silent = "says nothing: it died, or is not in a SyncBatchNorm"
            return silent if self._reachable else "cannot be asked: the store's host (rank 0) does not answer"
        fault = f" ({report['fault']})" if report["fault"] else ""
        return f"is in sum {report['call']}, {report['operation']}{fault}"

    def _do(self, job: Callable[[], None]) -> None:
        """Do a thing with the store, in a thread of its own: its host may be what has died."""
        if not self._reachable:
            return
        self._worker = self._worker or Worker("flatwater-reports")
        try:
            self._worker.submit(job).result(_GRACE)
        except Exception:  # whatever a dead connection raises: then the others cannot be asked
            self._reachable = False

    def _append(self, text: str) -> None:
        self._store = self._store or connect_store()
        index = self._store.add(self._key, 1)
        self._store.set(f"{self._key}/{index}", text)

    def _refresh(self) -> None:
        self._store = self._store or connect_store()
        last = self._store.add(self._key, 0)
        while self._read < last:
            self._read += 1
            report = json.loads(self._store.get(f"{self._key}/{self._read}"))
            if report["rank"] != self._rank:
                self._latest[report["rank"]] = report
