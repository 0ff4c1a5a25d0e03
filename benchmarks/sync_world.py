"""Processes that form a world, for what ranks do together: all run while one of them does, and all stop."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Any

from benchmarks import machine
from benchmarks.timing import Timer
from benchmarks.worker import Worker

__all__ = ["World"]


class World:
    """``size`` ranks on this machine, with gloo and one thread each, each a :class:`~benchmarks.worker.Worker`.

    Args:
        size: how many processes.
        module: of the ranks, within this package; its handler ``start`` joins the world.
    """

    def __init__(self, size: int, module: str) -> None:
        endpoints = [f"127.0.0.1:{port}" for port in _free_ports(size)]
        with contextlib.ExitStack() as stack:
            self._ranks = [stack.enter_context(Worker(module, environment)) for environment in _environments(endpoints)]
            self.call("start")
            self._stack = stack.pop_all()

    @property
    def pids(self) -> list[int]:
        """The processes' numbers, by rank."""
        return [rank.pid for rank in self._ranks]

    def call(self, name: str, **arguments: Any) -> list[Any]:
        """What the handler ``name`` of each rank returns, all of them running until the last has answered.

        Raises:
            WorkerError: it raised in one of them, or a process ended.
        """
        try:
            for rank in self._ranks:
                rank.ask(name, **arguments)
            return [rank.answer() for rank in self._ranks]
        finally:
            for rank in self._ranks:
                rank.stop()

    def timer(self, contender: str, note: Callable[[list[Any]], object] = lambda answers: None) -> Timer:
        """How to time a contender: the slowest rank's ``milliseconds`` in the answers of the handler ``time``.

        Args:
            contender: its name.
            note: is given all answers, by rank.
        """

        def milliseconds(repeats: int) -> float:
            answers = self.call("time", contender=contender, repeats=repeats)
            note(answers)
            return max(float(answer["milliseconds"]) for answer in answers)

        return milliseconds

    def __enter__(self) -> World:
        """The world; it ends with the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes, whatever happened."""
        self._stack.close()


def _environments(endpoints: list[str]) -> list[dict[str, str]]:
    """Those of each rank: tuned for this host, but of one thread, and with what ``paddle.distributed.launch`` sets."""
    return [
        machine.tuned_environment()
        | {
            "OMP_NUM_THREADS": "1",
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": str(len(endpoints)),
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            "PADDLE_CURRENT_ENDPOINT": endpoint,
            "PADDLE_MASTER": endpoints[0],
            "PADDLE_DISTRI_BACKEND": "gloo",
        }
        for rank, endpoint in enumerate(endpoints)
    ]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; bound together, so that all differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
