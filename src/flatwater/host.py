"""What a CPU host needs to train fast, found out and put into the environment.

Three things decide the speed of a convolutional training step on an ordinary CPU machine, and all
three are read once, when a process starts or first uses a library. So they belong in the
environment of the process, not in its code:

* **glibc's allocator** hands every large block back to the kernel when it is freed, and the next
  tensor pays for fresh pages. Raising its thresholds keeps activations in the process. What it
  costs: the process does not shrink again before it ends.
* **Threads**: one OpenMP thread per processor this process may use, which inside a container with
  a CPU limit is less than the machine has.
* **MKL on AMD**: the MKL inside Paddle's CPU wheel (2018) takes a slow path on processors that are
  not Intel's. ``MKL_DEBUG_CPU_TYPE=5`` selects the AVX2 path. It is set on AMD processors with AVX2
  only, for nothing else needs it.

A variable that the user has set is never changed.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from flatwater.errors import BackendError

__all__ = ["Setting", "launch", "missing", "settings"]


class Setting(NamedTuple):
    """One environment variable, the value this host needs, and why."""

    variable: str
    value: str
    reason: str


def settings(*, cpuinfo: str | None = None, libc: str | None = None, processors: int | None = None) -> list[Setting]:
    """The environment this host needs; the arguments stand in for the host in tests.

    Args:
        cpuinfo: the text of ``/proc/cpuinfo``.
        libc: the C library's name, ``"glibc"`` where the thresholds below mean something.
        processors: how many processors this process may use.
    """
    cpuinfo = _cpuinfo() if cpuinfo is None else cpuinfo
    libc = platform.libc_ver()[0] if libc is None else libc
    processors = _processors() if processors is None else processors

    found = []
    if libc == "glibc":
        keep = "freed tensors stay in the process: the next one takes no page faults"
        found += [
            Setting("MALLOC_MMAP_THRESHOLD_", str(8 << 30), keep),
            Setting("MALLOC_TRIM_THRESHOLD_", str(16 << 30), keep),
            Setting("MALLOC_TOP_PAD_", str(256 << 20), "the heap grows in large steps"),
        ]
    found.append(Setting("OMP_NUM_THREADS", str(processors), f"this process may use {processors} processors"))
    if "AuthenticAMD" in cpuinfo and "avx2" in cpuinfo:
        found.append(Setting("MKL_DEBUG_CPU_TYPE", "5", "Paddle's MKL takes a slow path on AMD unless told otherwise"))
    return found


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


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _processors() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2: "max 100000", or microseconds per period
    if quota.exists():
        share, _, period = quota.read_text(encoding="ascii").partition(" ")
        if share.isdigit() and period.strip().isdigit():
            allowed = min(allowed, max(1, math.ceil(int(share) / int(period))))
    return allowed
