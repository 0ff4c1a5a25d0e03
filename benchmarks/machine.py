"""What the figures were taken on: the machine, the versions, and the environment variables that matter."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import flatwater
from flatwater import host, kernels

__all__ = ["ENVIRONMENTS", "default_environment", "describe", "summary", "tuned_environment"]

# Of an environment, what decides how fast tensors are computed and allocated.
RELEVANT = re.compile(r"(OMP|KMP|GOMP|MKL|OPENBLAS|MALLOC|GLIBC|LD_PRELOAD|ONEDNN|DNNL|FLAGS|FLATWATER)")

PACKAGES = ("numpy", "paddlepaddle", "paddlepaddle-gpu", "torch")


def describe() -> dict[str, Any]:
    """Everything about this machine and process that a figure depends on, ready for JSON."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "processors": os.cpu_count(),
        "processors_usable": _usable_processors(),
        "caches": _caches(),
        "memory_bytes": _memory(),
        "system": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
        "load_average": list(os.getloadavg()),
        "versions": {"python": platform.python_version(), "flatwater": flatwater.__version__} | _versions(),
        "kernels": {"isa": kernels.isa(), "threads": kernels.threads()},
        "environment": relevant(os.environ),
        "tuned": {setting.variable: setting.value for setting in host.settings()},
    }


def summary(machine: Mapping[str, Any]) -> str:
    """One line for people."""
    versions = " · ".join(f"{name} {version}" for name, version in machine["versions"].items())
    kernel = machine["kernels"]
    return (
        f"{machine['cpu']}, {machine['processors_usable']} processors, caches {', '.join(machine['caches'])}\n"
        f"kernels: {kernel['isa']}, {kernel['threads']} threads · load {machine['load_average'][0]:.2f}\n{versions}"
    )


def tuned_environment() -> dict[str, str]:
    """The environment of this process, with what Flatwater would set on this host; what the user has set is kept."""
    return {setting.variable: setting.value for setting in host.settings()} | dict(os.environ)


def default_environment() -> dict[str, str]:
    """The environment of this process, without any variable that Flatwater would set on this host."""
    ours = {setting.variable for setting in host.settings()}
    return {name: value for name, value in os.environ.items() if name not in ours}


ENVIRONMENTS: dict[str, Callable[[], dict[str, str]]] = {"tuned": tuned_environment, "default": default_environment}


def relevant(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that :data:`RELEVANT` finds."""
    return {name: value for name, value in sorted(environment.items()) if RELEVANT.match(name)}


def _versions() -> dict[str, str]:
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    return {package: installed[package] for package in PACKAGES if package in installed}


def _usable_processors() -> int | None:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def _cpu_model() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return names[0] if names else platform.processor() or "unknown"


def _caches() -> list[str]:
    """Of the first processor, as in ``L2 1024K``; empty where the system does not say."""
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(index / name).strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return found


def _memory() -> int | None:
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(total[1]) * 1024 if total else None


def _read(path: str | Path) -> str:
    path = Path(path)
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
