"""What follows from what there is: the environment that a training process on this host should have."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from flatwater.errors import LaunchError
from flatwater.host.facts import Host, allocator, libc

__all__ = [
    "MALLOC",
    "Decision",
    "Setting",
    "State",
    "decisions",
    "kept_by_malloc",
    "launch",
    "missing",
    "present",
    "settings",
    "standing",
]

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "glibc.malloc.mmap_threshold",
    "MALLOC_MMAP_MAX_": "glibc.malloc.mmap_max",
    "MALLOC_TRIM_THRESHOLD_": "glibc.malloc.trim_threshold",
    "MALLOC_TOP_PAD_": "glibc.malloc.top_pad",
}
"""What glibc's malloc reads when a process starts, and by which name GLIBC_TUNABLES sets the same: see mallopt(3)."""

# An older glibc silently ignores an mmap threshold of more than 32 MiB (commit 0a4df6f534 removed the limit).
_UNLIMITED_SINCE = (2, 35)
_OLD_LIMIT = 32 << 20

# How MKL_DEBUG_CPU_TYPE names its code paths.
_MKL_PATHS = {"avx512": "7", "avx2": "5"}

State = Literal["set", "already", "yours", "missing", "too late", "not needed"]


class Setting(NamedTuple):
    """One environment variable, the value this host needs, and why."""

    variable: str
    value: str
    reason: str


class Decision(NamedTuple):
    """One environment variable, the value this host needs or None if it would not help here, and why."""

    variable: str
    value: str | None
    reason: str


def decisions(host: Host | None = None) -> list[Decision]:
    """For each variable that Flatwater knows: what this host needs, or why it needs nothing.

    Args:
        host: another than this one.
    """
    host = Host.look() if host is None else host
    return [*_allocator(host), _threads(host), _mkl(host)]


def settings(host: Host | None = None) -> list[Setting]:
    """The environment this host needs: the :func:`decisions` that have a value."""
    return [Setting(name, value, reason) for name, value, reason in decisions(host) if value is not None]


def missing(environment: Mapping[str, str]) -> list[Setting]:
    """Those of :func:`settings` about which ``environment`` says nothing yet."""
    return [setting for setting in settings() if present(setting.variable, environment) is None]


def present(variable: str, environment: Mapping[str, str]) -> str | None:
    """What ``environment`` says about a setting, by its variable or through GLIBC_TUNABLES; None if nothing.

    Of both, GLIBC_TUNABLES holds, and of several assignments in it the last.
    """
    found = environment.get(variable)
    for assignment in environment.get("GLIBC_TUNABLES", "").split(":"):
        name, equals, value = assignment.partition("=")
        if equals and name == MALLOC.get(variable):
            found = value
    return found


def kept_by_malloc(environment: Mapping[str, str], root: Path = Path("/")) -> int:
    """Up to which size in bytes ``environment`` makes glibc's malloc keep freed blocks for the main thread; 0 if none.

    What is mapped by itself goes back when it is freed, and so does what lies at the heap's end beyond the trim
    threshold. Another malloc reads neither.
    """
    name, version = libc(root)
    if name != "glibc" or allocator(root, environment):
        return 0
    trimmed_from = _size(present("MALLOC_TRIM_THRESHOLD_", environment))
    if (present("MALLOC_MMAP_MAX_", environment) or "").strip() == "0":  # no block is mapped by itself
        return trimmed_from
    mapped_from = _size(present("MALLOC_MMAP_THRESHOLD_", environment))
    if mapped_from > _OLD_LIMIT and _version(version) < _UNLIMITED_SINCE:
        return 0
    return min(mapped_from, trimmed_from)


def standing(decision: Decision, environment: Mapping[str, str]) -> State:
    """How ``environment`` stands to what is needed: ``"not needed"``, ``"missing"``, ``"already"`` or ``"yours"``."""
    found = present(decision.variable, environment)
    if decision.value is None:
        return "not needed" if found is None else "yours"
    if found is None:
        return "missing"
    return "already" if found == decision.value else "yours"


def launch(command: Sequence[str]) -> NoReturn:
    """Replace this process by ``command``, run in the environment that this host needs.

    Raises:
        LaunchError: there is no such program, or it cannot be executed.
    """
    environment = dict(os.environ) | {setting.variable: setting.value for setting in missing(os.environ)}
    program = command[0] if command else ""
    if not program:  # which exec takes for a mistake of the caller's
        raise LaunchError(f"cannot run {program!r}, which names no program; give one, and its arguments after it", 127)
    sys.stdout.flush()
    sys.stderr.flush()
    # Python ignores these, and what is ignored stays so across exec: `yes | head` in the command would complain.
    for name in ("SIGPIPE", "SIGXFSZ"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvpe(program, list(command), environment)
    except FileNotFoundError as error:
        raise LaunchError(
            f"cannot run {program!r}: {error.strerror}; check the name, the PATH, and what interpreter a script names",
            127,
        ) from error
    except OSError as error:
        raise LaunchError(
            f"cannot run {program!r}: {error.strerror}; check that it is a program, or a script whose first line names "
            "its interpreter, and that you may execute it",
            126,
        ) from error


def _allocator(host: Host) -> list[Decision]:
    """The thresholds, unless another malloc than glibc's is in use.

    Not among them is ``glibc.malloc.hugetlb``, which asks for transparent huge pages: once memory stays in the process,
    the networks of :mod:`benchmarks.host` gained no more from them than one run differs from the next, 3 %.
    """
    unused = ""
    if host.libc != "glibc":
        unused = f"only glibc reads it, this is {host.libc or 'another C library'}"
    elif host.allocator:
        unused = f"{Path(host.allocator).name} replaces glibc's malloc"
    if unused:
        names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
        return [Decision(name, None, unused) for name in names]
    most = host.memory or 16 << 30  # more than there is would say nothing else
    keep, limit = "MALLOC_MMAP_THRESHOLD_", min(8 << 30, most)
    if _version(host.libc_version) < _UNLIMITED_SINCE:
        keep, limit = "MALLOC_MMAP_MAX_", 0  # no block is mapped by itself, whatever its size
    return [
        Decision(keep, str(limit), "freed tensors stay: no page faults"),
        Decision("MALLOC_TRIM_THRESHOLD_", str(min(16 << 30, most)), "also at the heap's end"),
        Decision("MALLOC_TOP_PAD_", str(min(256 << 20, most >> 6)), "the heap grows in large steps"),
    ]


def _size(text: str | None) -> int:
    """As glibc reads a size: -1 is the largest that there is. What is no number keeps nothing."""
    try:
        return int(text or "") % (1 << 64)
    except ValueError:
        return 0


def _version(text: str) -> tuple[int, ...]:
    """``"2.36"`` as (2, 36); an unknown one is the oldest."""
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def _threads(host: Host) -> Decision:
    """One a core: the processors of a core share what loops like MKL's and oneDNN's are made to fill alone."""
    name = "OMP_NUM_THREADS"
    if host.bound_to == 1:
        return Decision(name, None, "on one processor there is one thread anyway")
    most, shared = host.processors, "processors"
    reason = "one a processor; Paddle takes 1"
    if host.processors < host.bound_to:
        reason = f"a control group limits {host.bound_to} processors to {host.processors}"
    if host.cores < host.processors:
        most, shared = host.cores, "cores"
        reason = f"one a core: the {host.bound_to} processors are {host.cores} core{'s' * (host.cores > 1)}"
    if host.ranks > 1:
        reason = f"{host.ranks} ranks share {most} {shared}"
    return Decision(name, str(max(1, most // host.ranks)), reason)


def _mkl(host: Host) -> Decision:
    name = "MKL_DEBUG_CPU_TYPE"
    if not host.mkl:
        return Decision(name, None, "no MKL that reads it is installed here")
    if host.vendor != "AuthenticAMD":
        return Decision(name, None, "only processors of AMD are known to need it")
    if host.isa not in _MKL_PATHS:
        return Decision(name, None, "the paths it selects need AVX2, which this processor lacks")
    return Decision(name, _MKL_PATHS[host.isa], "MKL's slow path on AMD otherwise")
