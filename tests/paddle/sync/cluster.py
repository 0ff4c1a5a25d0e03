"""Processes on this machine that form a world: started, awaited, killed at the end whatever happens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Ended", "Place", "run_world"]

_HERE = Path(__file__).parent


@dataclass
class Ended:
    """How a rank ended: its exit status, and everything that it printed."""

    status: int
    output: str


@dataclass(frozen=True)
class Place:
    """Where a rank runs: the address at which the others reach it, and what starts a command there."""

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def run_world(
    size: int, script: str, *args: str | Path, timeout: float = 100.0, places: Sequence[Place] = ()
) -> list[Ended]:
    """Run ``script`` in ``size`` processes that know of each other, with gloo, and wait for all of them."""
    places = places or [Place()] * size
    endpoints = [f"{place.address}:{port}" for place, port in zip(places, _free_ports(size), strict=True)]
    ranks = []
    try:
        for rank, (place, endpoint) in enumerate(zip(places, endpoints, strict=True)):
            environment = {
                **os.environ,
                **dict(place.environment),
                "PADDLE_TRAINER_ID": str(rank),
                "PADDLE_TRAINERS_NUM": str(size),
                "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
                "PADDLE_CURRENT_ENDPOINT": endpoint,
                "PADDLE_MASTER": endpoints[0],
                "PADDLE_DISTRI_BACKEND": "gloo",
                "OMP_NUM_THREADS": "1",
            }
            command = [*place.prefix, sys.executable, str(_HERE / script), *map(str, args)]
            output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            ranks.append(subprocess.Popen(command, env=environment, text=True, errors="replace", **output))
        outputs = [process.communicate(timeout=timeout)[0] for process in ranks]
        return [Ended(process.returncode, output) for process, output in zip(ranks, outputs, strict=True)]
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; bound together, so that all differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
