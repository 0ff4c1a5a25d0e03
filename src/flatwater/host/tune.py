"""What can still be done for a process that runs already."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Container, Mapping
from pathlib import Path
from typing import NamedTuple

from flatwater.host.facts import Host
from flatwater.host.settings import MALLOC, Decision, State, decisions, present, standing

__all__ = ["Effect", "tune"]

# Parameters of mallopt(3), from malloc.h.
_MALLOPT = dict(zip(MALLOC, (-3, -4, -1, -2), strict=True))
_LARGEST_INT = 2**31 - 1

_OPENMP = ("libgomp", "libiomp5", "libomp", "libomp5")

_RESTART = "start it by `flatwater run -- python ...`"


class Effect(NamedTuple):
    """What :func:`tune` did about one setting.

    Attributes:
        variable: the environment variable by whose name the setting goes.
        value: what this host needs; None if nothing.
        state: ``"set"``: now in effect. ``"already"``: it was. ``"yours"``: the environment says something else, which
            was kept. ``"too late"``: what reads it has read it. ``"not needed"``: it would not help here.
        reason: why, and what to do where it is too late.
    """

    variable: str
    value: str | None
    state: State
    reason: str


def tune() -> list[Effect]:
    """Put into effect, in this process, what its host needs, as far as that is still possible, and say what is not.

    * The allocator is told through ``mallopt``, at any time. Its values are C ints; what is larger becomes -1, no
      limit. As with the environment, it holds for the heap of the main thread: other threads' heaps are 64 MiB each,
      and what does not fit there is mapped by itself. Flatwater's layers leave to it what it keeps from then on, as
      under ``flatwater run``.
    * Threads: each OpenMP runtime that is loaded is told through ``omp_set_num_threads``, which holds for the thread
      that calls ``tune``; runtimes to come read the environment. Flatwater's kernels take the number too, whatever
      thread calls them, unless :func:`flatwater.kernels.set_threads` has said another. Which runtime's threads they
      are is not for ``tune`` to change: see :mod:`flatwater.kernels`.
    * MKL reads its variable at its first use; Paddle loads it then, and not when it is imported. After that it is
      too late.

    So the best place for the call is the first line of a program, and one before the first tensor will do. What is set
    is in ``os.environ`` as well, for child processes.

    Returns:
        One effect for each setting; nothing is lost without a word.

    Raises:
        ConfigError: PADDLE_LOCAL_SIZE is no number of processes.
    """
    loaded = _loaded()
    effects = [_effect(decision, loaded) for decision in decisions(Host.look())]
    if memory := sys.modules.get("flatwater.paddle.memory"):  # which has looked when it was imported
        memory.follow_malloc()
    return effects


def _effect(decision: Decision, loaded: Mapping[str, Path]) -> Effect:
    variable, value, reason = decision
    state = standing(decision, os.environ)
    if variable == "OMP_NUM_THREADS" and state in ("yours", "already") and _is_paddles(loaded):
        state = "missing"
    if value is None or state != "missing":
        found = present(variable, os.environ)
        return Effect(variable, value, state, reason if found is None else f"the environment says {found}")
    if variable in MALLOC:
        late = "" if _mallopt(variable, int(value)) else "the C library refuses it at run time"
    elif variable == "OMP_NUM_THREADS":
        late = _set_threads(int(value), loaded)
    else:
        late = next((f"{name} has read it" for name in loaded if name.startswith("libmklml")), "")
    if late:
        return Effect(variable, value, "too late", f"{late}; {_RESTART}")
    os.environ[variable] = value
    return Effect(variable, value, "set", reason)


def _mallopt(variable: str, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_MALLOPT[variable], value if value <= _LARGEST_INT else -1) == 1


def _set_threads(count: int, loaded: Mapping[str, Path]) -> str:
    """Tell every OpenMP runtime in this process, and Flatwater's kernels, which have asked theirs when first used.

    Returns what is wrong with the first that does not follow.
    """
    for runtime in _runtimes(loaded):
        runtime.omp_set_num_threads(count)
        if runtime.omp_get_max_threads() != count:
            return f"an OpenMP runtime keeps to {runtime.omp_get_max_threads()} threads"
    if launch := sys.modules.get("flatwater.kernels.launch"):
        launch.set_default_threads(count)
    return ""


def _is_paddles(loaded: Mapping[str, Path]) -> bool:
    """Whether OMP_NUM_THREADS is the 1 that Paddle sets at the end of its import because nobody has set anything.

    GNU's runtime, which that import loads earlier, has then not read it.
    """
    saw = [runtime.omp_get_max_threads() for runtime in _runtimes(loaded, ("libgomp",))]
    return "paddle" in sys.modules and os.environ["OMP_NUM_THREADS"] == "1" and min(saw, default=1) > 1


def _runtimes(loaded: Mapping[str, Path], names: Container[str] = _OPENMP) -> list[ctypes.CDLL]:
    # PyTorch and others bring a copy under a name like libgomp-a34b3233.so.1.
    return [ctypes.CDLL(str(file)) for name, file in loaded.items() if re.split(r"[-.]", name)[0] in names]


def _loaded() -> dict[str, Path]:
    """The shared libraries of this process, by their file names."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines() if maps.exists() else []
    files = (Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6)
    return {file.name: file for file in files if ".so" in file.name and not file.name.endswith("(deleted)")}
