"""What can still be done for a process that runs already."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from flatwater.host.facts import Host
from flatwater.host.settings import ALLOCATOR, Decision, decisions

__all__ = ["Effect", "State", "tune"]

State = Literal["set", "already", "yours", "too late", "not needed"]

# Parameters of mallopt(3), from malloc.h; it takes them as int, so no value is larger than 2 GiB.
_MALLOPT = dict(zip(ALLOCATOR, (-3, -1, -2), strict=True))
_LARGEST_INT = 2**31 - 1

_OPENMP = ("libgomp", "libiomp", "libomp")


class Effect(NamedTuple):
    """What :func:`tune` did about one setting.

    Attributes:
        variable: the environment variable by whose name the setting goes.
        value: what this host needs; None if nothing.
        state: ``"set"``: now in effect. ``"already"``: it was. ``"yours"``: the environment says something else, which
            was kept. ``"too late"``: what would read it has been loaded. ``"not needed"``: it would not help here.
        reason: why, and what to do where it is too late.
    """

    variable: str
    value: str | None
    state: State
    reason: str


def tune() -> list[Effect]:
    """Put into effect, in this process, what its host needs, as far as that is still possible, and say what is not.

    Call it before ``import paddle``. Then everything can be set: the allocator through ``mallopt`` (which holds for
    the main thread's heap, and for blocks up to 2 GiB), the others in the environment, which child processes inherit.
    After ``import paddle`` only the allocator can: OpenMP and MKL have read theirs.

    Returns:
        One effect for each setting; nothing is lost without a word.
    """
    return [_effect(decision) for decision in decisions(Host.look())]


def _effect(decision: Decision) -> Effect:
    variable, value, reason = decision
    if value is None:
        return Effect(variable, value, "not needed", reason)
    present = os.environ.get(variable)
    if present is not None and not _is_paddles(variable, present):
        return Effect(variable, value, "already" if present == value else "yours", f"the environment says {present}")
    if variable in _MALLOPT:
        apply: Callable[[str, str], bool] = _mallopt
    else:
        late = _reader(variable)
        if late:
            return Effect(
                variable,
                value,
                "too late",
                f"{late} has read it; start with `flatwater run -- python ...`, or call tune() before `import paddle`",
            )
        apply = _setenv
    if not apply(variable, value):
        return Effect(variable, value, "too late", "the C library refused it; start with `flatwater run -- python ...`")
    return Effect(variable, value, "set", reason)


def _mallopt(variable: str, value: str) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_MALLOPT[variable], min(int(value), _LARGEST_INT)) == 1


def _setenv(variable: str, value: str) -> bool:
    os.environ[variable] = value
    return True


def _is_paddles(variable: str, present: str) -> bool:
    """Whether the value is the one that Paddle sets when it is imported and nobody has set another."""
    if variable != "OMP_NUM_THREADS" or present != "1" or "paddle" not in sys.modules:
        return False
    initial = Path("/proc/self/environ")
    return initial.exists() and b"OMP_NUM_THREADS=" not in initial.read_bytes()


def _reader(variable: str) -> str:
    """What is loaded in this process and has read the variable; empty if nothing has."""
    if "paddle" in sys.modules:
        return "Paddle"
    if variable != "OMP_NUM_THREADS":
        return ""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text(encoding="utf-8", errors="replace") if maps.exists() else ""
    return next((f"an OpenMP runtime ({name})" for name in _OPENMP if f"/{name}" in loaded), "")
