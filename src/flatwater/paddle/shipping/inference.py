"""Paddle Inference, in a process of its own.

Some programs make its passes crash: oneDNN's with ``leaky_relu`` behind a convolution with a bias (Paddle 3.3.1), for
one. That must be a form that failed, not the end of the training process that wanted to verify.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from flatwater.paddle.shipping import inference_worker
from flatwater.verify import Arrays, Run

__all__ = ["InferenceError", "load_inference"]


class InferenceError(Exception):
    """Paddle Inference did not load or run a program. Its message is Paddle's; verification makes a row of it."""


def load_inference(program: Path, parameters: Path, *, ir: bool, onednn: bool) -> Run:
    """A predictor on the CPU, with its IR passes and oneDNN as told.

    All predictors share one process, which is started with the first, started again where one of them has crashed
    it, and ends after a minute in which nobody asks for anything.

    Raises:
        InferenceError: Paddle cannot load the program, or crashes; calling what is returned raises it as well.
    """
    return _Predictor((str(program), str(parameters), ir, onednn))


class _Predictor:
    _numbers = itertools.count()

    def __init__(self, files: tuple[str, str, bool, bool]) -> None:
        self._files = files
        self._number = next(self._numbers)
        self._process = self._load()
        weakref.finalize(self, _dropped.append, self._number)

    def __call__(self, inputs: Arrays) -> Arrays:
        if self._process is not _process():
            self._process = self._load()
        found: Arrays = self._process.ask("run", self._number, inputs)
        return found

    def _load(self) -> _Process:
        process = _process()
        process.ask("load", self._number, self._files)
        return process


class _Process:
    """The process, and the only connection to it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 # as long as the process
        self._connection, theirs = Pipe()
        command = [sys.executable, inference_worker.__file__, str(theirs.fileno())]
        # Ctrl-C is for this process; the other one ends when its connection closes.
        self._popen = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        theirs.close()

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return not self._connection.closed and self._popen.poll() is None

    def ask(self, kind: str, number: int, argument: Any) -> Any:
        """Its answer.

        Raises:
            InferenceError: Paddle raised, or the process has ended.
        """
        with self._lock:
            dropped = [_dropped.pop() for _ in range(len(_dropped))]
            try:
                self._connection.send((kind, number, argument, dropped))
                failed, answer = self._connection.recv()
            except (EOFError, ConnectionError):
                raise InferenceError(self._end()) from None
            except BaseException:  # the answer is still to come, and would be taken for the next one's
                self.close()
                raise
        if failed:
            raise InferenceError(answer)
        return answer

    def close(self) -> None:
        """End it."""
        self._connection.close()
        if self.owner == os.getpid():
            self._popen.kill()
            self._popen.wait()
        self._log.close()

    def _end(self) -> str:
        """Why it has ended."""
        code = self._popen.wait()
        self.close()
        if code >= 0:
            return f"the process in which Paddle Inference ran has ended with exit code {code}"
        with contextlib.suppress(ValueError):
            return f"Paddle Inference crashed the process in which it ran ({signal.Signals(-code).name})"
        return f"Paddle Inference crashed the process in which it ran (signal {-code})"


_dropped: list[int] = []
"""Numbers of predictors that are gone, for the process to be told in passing."""

_started: list[_Process] = []


def _process() -> _Process:
    """The one in use, of this process and not of the one from which it was forked."""
    if not _started or not _started[0].alive or _started[0].owner != os.getpid():
        _close()
        _started[:] = [_Process()]
    return _started[0]


@atexit.register
def _close() -> None:
    for process in _started:
        process.close()
    _started.clear()
