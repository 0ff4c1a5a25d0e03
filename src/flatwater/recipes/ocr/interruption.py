"""Ctrl-C, and what stands for it, as something that training looks at between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["interruption"]


@contextlib.contextmanager
def interruption() -> Iterator[threading.Event]:
    """An event that SIGINT (Ctrl-C) or SIGTERM sets. The second Ctrl-C does what it does elsewhere.

    Paddle's launcher hands a Ctrl-C on as SIGTERM, three times. Signals reach the main thread only: in any other,
    nobody sets the event.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        event.set()
        if number == signal.SIGINT:
            signal.signal(number, previous[signal.SIGINT])

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
