"""What ranks in trouble tell each other, through the store: who waits where, and who has given up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from flatwater.paddle.sync.rendezvous import connect_store
from flatwater.paddle.sync.transport import Worker

__all__ = ["Report", "Reports"]

# How long the store may take to answer.
_ANSWER = 2.0
# The rank in whose process the store is.
_HOST = 0


@dataclass(frozen=True)
class Report:
    """What a rank says about itself.

    Attributes:
        rank: whose report it is.
        call: how many sums it has begun.
        operation: what the last of them is for.
        layer: the same, but for the moving statistics that the rank has.
        fault: why it gave up; None while it waits.
    """

    rank: int
    call: int
    operation: str
    layer: str
    fault: str | None = None

    def __str__(self) -> str:
        fault = f" ({self.fault})" if self.fault else ""
        return f"is in sum {self.call}, {self.operation}{fault}"


class Reports:
    """The reports of a communicator's ranks. Nothing here raises, or blocks for longer than seconds."""

    def __init__(self, ranks: tuple[int, ...], rank: int) -> None:
        self._others = [other for other in ranks if other != rank]
        self._key = f"flatwater/reports/{','.join(map(str, ranks))}"
        self._worker = Worker("flatwater-reports")
        # Now, while the store's host lives; whoever looks for it later may look for long.
        self._connecting = self._worker.submit(connect_store)
        self._published: Report | None = None
        self._read = 0
        self._latest: dict[int, Report] = {}
        self._reachable = True
        self._asked = False

    def publish(self, report: Report) -> None:
        """Let the others know, if they do not."""
        if report != self._published:
            self._published = report
            self._do(lambda: self._append(json.dumps(asdict(report))))

    def contradict(self, mine: Report) -> bool:
        """Whether a rank, when last heard of, had given up or was at something else."""
        return any(
            report.fault or (report.call == mine.call and report.operation != mine.operation)
            for report in list(self._latest.values())
        )

    def refresh(self) -> None:
        """Read what the others have said."""
        self._do(self._refresh)

    def collect(self, mine: Report, seconds: float) -> str:
        """What every other rank says, when all have spoken, or after so long."""

        def spoken(rank: int) -> bool:
            return rank in self._latest and self._latest[rank].call >= mine.call

        self._asked = False  # what was asked before says nothing of who lives now
        self._look(seconds, lambda: all(map(spoken, self._others)))
        heard = [rank for rank in self._others if spoken(rank) or (rank in self._latest and self._latest[rank].fault)]
        silent = [rank for rank in self._others if rank not in heard]
        return "; ".join([*(f"rank {rank} {self._latest[rank]}" for rank in heard), *self._why_silent(silent)])

    def differ_in_statistics(self, mine: Report) -> bool:
        """Whether the others were at the same layer when last heard of, some with other moving statistics."""
        same_call = [report for report in list(self._latest.values()) if report.call == mine.call]
        differ = [report for report in same_call if report.operation != mine.operation]
        return bool(differ) and all(report.layer == mine.layer for report in differ)

    def _why_silent(self, silent: list[int]) -> list[str]:
        if self._asked:
            return [f"rank {rank} says nothing: it died, or is busy elsewhere" for rank in silent]
        # What rank 0 hosts is how the others could be asked: of its death they are no part.
        rest = [str(rank) for rank in silent if rank != _HOST]
        asked = f"rank{'s' if len(rest) > 1 else ''} {', '.join(rest)} cannot be asked" if rest else ""
        if _HOST in silent:
            asked = f", so that {asked}" if asked else ""
            return [f"rank {_HOST}, which hosts the store, does not answer: it died, or cannot be reached{asked}"]
        return [f"{asked}: the store, which rank {_HOST} hosts, does not answer"] if asked else []

    def _look(self, seconds: float, found: Callable[[], bool]) -> bool:
        """Read until ``found`` holds, or for so long."""
        end = time.monotonic() + seconds
        while self._reachable and time.monotonic() < end:
            self.refresh()
            if found():
                return True
            time.sleep(0.05)
        return False

    def _do(self, job: Callable[[], None]) -> None:
        """Do a thing with the store, in a thread of its own: its host may be what has died."""
        if not self._reachable:
            return
        try:
            self._worker.submit(job).result(_ANSWER)
        except Exception:  # whatever a dead connection raises: then the others cannot be asked
            self._reachable = False

    def _append(self, text: str) -> None:
        store = self._connecting.result()
        store.set(f"{self._key}/{store.add(self._key, 1)}", text)

    def _refresh(self) -> None:
        store = self._connecting.result()
        last = store.add(self._key, 0)
        while self._read < last:
            self._read += 1
            report = Report(**json.loads(store.get(f"{self._key}/{self._read}")))
            if report.rank in self._others:
                self._latest[report.rank] = report
        self._asked = True
