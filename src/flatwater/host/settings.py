"""What follows from what there is: the environment that a training process on this host should have."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from flatwater.errors import BackendError
from flatwater.host.facts import Host

__all__ = ["ALLOCATOR", "Decision", "Setting", "decisions", "launch", "missing", "settings"]

ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
"""What glibc's malloc reads when a process starts: see mallopt(3)."""


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
    return [setting for setting in settings() if setting.variable not in environment]


def launch(command: Sequence[str]) -> NoReturn:
    """Replace this process by ``command``, run in the environment that this host needs.

    Raises:
        BackendError: there is no such program.
    """
    environment = dict(os.environ) | {setting.variable: setting.value for setting in missing(os.environ)}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(command[0], list(command), environment)
    except OSError as error:
        raise BackendError(
            f"cannot run {command[0]!r}: {error.strerror}; check the name and its permissions"
        ) from error


def _allocator(host: Host) -> list[Decision]:
    if host.libc != "glibc":
        return [
            Decision(name, None, f"only glibc reads it; here is {host.libc or 'another C library'}")
            for name in ALLOCATOR
        ]
    if host.allocator:
        return [Decision(name, None, f"{host.allocator} replaces glibc's malloc") for name in ALLOCATOR]
    most = host.memory or 16 << 30  # more than there is would say nothing else
    values = (min(8 << 30, most), min(16 << 30, most), min(256 << 20, most >> 6))
    reasons = (
        "freed tensors stay in the process: the next ones take no page faults",
        "and are not handed back to the system from the end of the heap either",
        "the heap grows in large steps",
    )
    return [Decision(*each) for each in zip(ALLOCATOR, map(str, values), reasons, strict=True)]


def _threads(host: Host) -> Decision:
    reason = f"this process may use {host.processors} processors"
    if host.cores < host.bound_to:
        reason += f", threads of {host.cores} cores"
    if host.processors < host.bound_to:
        reason += f" of {host.bound_to}, by the limit of its control group"
    return Decision("OMP_NUM_THREADS", str(host.processors), f"{reason}; Paddle alone would take one")


def _mkl(host: Host) -> Decision:
    name = "MKL_DEBUG_CPU_TYPE"
    if host.vendor != "AuthenticAMD":
        return Decision(name, None, "MKL takes its fast path on this processor by itself")
    if not host.avx2:
        return Decision(name, None, "the path it selects needs AVX2, which this processor lacks")
    if not host.mkl:
        return Decision(name, None, "no MKL that reads it is installed here")
    return Decision(name, "5", "Paddle's MKL takes a slow path on AMD unless told to take AVX2's")
