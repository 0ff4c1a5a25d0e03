"""Where ranks find each other: the store that Paddle's launcher provides, and where this host is reached.

The store takes 44 ms to answer, and a connection to it must not be shared by threads (both measured with Paddle
3.3.1). So it serves to make connections and to tell faults apart, never in the steady state.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from paddle.base import core

from flatwater.errors import DistributedError

__all__ = ["connect_store", "own_host"]


def connect_store() -> Any:
    """A connection of the caller's own to the store in which Paddle's ranks find each other.

    Raises:
        DistributedError: the environment does not say where it is.
    """
    return core.TCPStore(*_store_address(), False, 0)  # not the master, and counted among no number of workers


def own_host() -> str:
    """The address from which this host sees the store, and at which the other ranks' hosts see this one.

    Raises:
        DistributedError: the environment does not say where the store is.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(_store_address())  # sends nothing
        return str(probe.getsockname()[0])


def _store_address() -> tuple[str, int]:
    host, port = os.getenv("MASTER_ADDR"), os.getenv("MASTER_PORT")
    if not (host and port):
        first = os.getenv("PADDLE_MASTER") or os.getenv("PADDLE_TRAINER_ENDPOINTS", "").split(",")[0]
        host, _, port = first.rpartition(":")
    if not (host and port.isdigit()):
        raise DistributedError(
            f"the rendezvous store is at {host!r}:{port!r}, which is no address; "
            "start the processes with python -m paddle.distributed.launch"
        )
    return host, int(port)
