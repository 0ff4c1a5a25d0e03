"""Frameworks in processes of their own, of which only one runs at a time.

Paddle and PyTorch each bring an OpenMP runtime whose idle threads spin for a while, and allocators and maths libraries
read their settings when a process starts. So each framework, and each environment, has its own process here. All but
the one that measures are stopped (SIGSTOP): what spins or sleeps in them takes no processor from it.

Requests and answers are lines of JSON on the worker's standard input and output.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.timing import Timer

__all__ = ["Handlers", "Worker", "WorkerError", "serve"]

Handlers = Mapping[str, Callable[..., Any]]
"""What a worker does, by the name under which it is asked; keyword arguments and results are JSON."""

ROOT = Path(__file__).parents[1]


class WorkerError(RuntimeError):
    """A request failed in the worker; the message carries its traceback."""


class Worker:
    """A process that runs ``python -m benchmarks.MODULE``, stopped except while it answers.

    Args:
        module: the module's name within this package; it calls :func:`serve`.
        environment: all of the process's environment.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        # Both frameworks have much to say when they are imported; it is shown if the worker fails.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 – close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}"],
            cwd=ROOT,
            env=dict(environment) | {"GLOG_minloglevel": "2"},  # Paddle's C++ side: errors only
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
        )
        self.answer()  # it says when it is ready
        self.stop()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def call(self, name: str, **arguments: Any) -> Any:
        """What the handler ``name`` returns for these arguments.

        Raises:
            WorkerError: it raised, or the process ended.
        """
        try:
            self.ask(name, **arguments)
            return self.answer()
        finally:
            self.stop()

    def ask(self, name: str, **arguments: Any) -> None:
        """Let the process run on and begin the handler ``name``: for workers that wait for each other meanwhile."""
        assert self._process.stdin is not None
        os.kill(self.pid, signal.SIGCONT)
        self._process.stdin.write(json.dumps({"name": name, "arguments": arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """What the handler that was asked for returned.

        Raises:
            WorkerError: it raised, or the process ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise WorkerError(f"the worker ended with exit code {self._process.wait()}:\n{self._errors.read()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["value"]

    def stop(self) -> None:
        """Stop the process until it is asked again."""
        with contextlib.suppress(ProcessLookupError):  # it may just have ended
            os.kill(self.pid, signal.SIGSTOP)

    def timer(self, contender: str) -> Timer:
        """How to time one of the worker's contenders, through its handler ``time``."""
        return lambda repeats: float(self.call("time", contender=contender, repeats=repeats))

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._errors.close()

    def __enter__(self) -> Worker:
        """The worker; it ends with the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process, whatever happened."""
        self.close()


def serve(handlers: Handlers) -> None:
    """Answer requests until standard input ends. Whatever the handlers print goes to standard error."""
    warnings.simplefilter("ignore")  # both frameworks warn in every step of what is measured
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        print(json.dumps({"value": "ready"}), file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = {"value": handlers[request["name"]](**request["arguments"])}
            except Exception:
                # Not lost: it is raised again in the process that asked.
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)
