"""What there is: processors, limits, memory, C library, allocator, MKL."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flatwater.errors import ConfigError

__all__ = ["Host", "allocator", "libc", "old_mkl", "usable_processors"]

# What a processor must have for the kernels of that name, by its flags in /proc/cpuinfo; the best first.
_INSTRUCTIONS = {
    "avx512": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma"},
}

_ALLOCATORS = ("jemalloc", "mimalloc", "snmalloc", "tbbmalloc", "tcmalloc")


@dataclass(frozen=True)
class Host:
    """What was found out about the machine, and about what this process may use of it.

    Attributes:
        vendor: of the processor, as ``/proc/cpuinfo`` has it: ``"AuthenticAMD"``; empty where unknown.
        isa: its best instruction set: ``"avx512"``, ``"avx2"``, or empty for another.
        processors: how many this process may use: those it is bound to, within the limits of its control groups.
        bound_to: how many it is bound to.
        cores: how many cores these are; fewer than processors where cores are shared (hyper-threading).
        memory: bytes that this process may use, by the machine and its control groups; 0 where unknown.
        huge_pages: when the kernel gives transparent ones: ``"always"``, ``"madvise"``, ``"never"``, empty if unknown.
        libc: the C library: ``"glibc"``, ``"musl"``, empty for another.
        libc_version: its version, empty where unknown.
        allocator: the preloaded library that replaces its ``malloc``, empty if there is none.
        mkl: the file of an MKL that reads MKL_DEBUG_CPU_TYPE, empty if there is none.
        ranks: how many processes Paddle's launcher started on this host, which share its processors.
    """

    vendor: str = ""
    isa: str = ""
    processors: int = 1
    bound_to: int = 1
    cores: int = 1
    memory: int = 0
    huge_pages: str = ""
    libc: str = ""
    libc_version: str = ""
    allocator: str = ""
    mkl: str = ""
    ranks: int = 1

    @classmethod
    def look(cls, root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Host:
        """Find out about this host, from the files below ``root``, which tests replace.

        Raises:
            ConfigError: PADDLE_LOCAL_SIZE in ``environment`` is no number of processes.
        """
        cpuinfo = _text(root / "proc/cpuinfo")
        bound = _bound()
        name, version = libc(root)
        return cls(
            vendor=_field(cpuinfo, "vendor_id"),
            isa=_isa(_field(cpuinfo, "flags")),
            processors=usable_processors(root),
            bound_to=len(bound),
            cores=_cores(root, bound),
            memory=min([limit for limit in (_memory_total(root), *_memory_limits(root)) if limit], default=0),
            huge_pages=_chosen(_text(root / "sys/kernel/mm/transparent_hugepage/enabled")),
            libc=name,
            libc_version=version,
            allocator=allocator(root, environment),
            mkl=old_mkl(),
            ranks=_ranks(environment),
        )


def usable_processors(root: Path = Path("/")) -> int:
    """How many processors this process may use: those it is bound to, within the limits of its control groups."""
    return min([len(_bound()), *_cpu_limits(root)])


def libc(root: Path) -> tuple[str, str]:
    """The C library's name and version, as :class:`Host` has them."""
    name, version = platform.libc_ver()
    # Python knows musl since 3.13 only, but its loader is mapped into every process.
    if not name and "/ld-musl-" in _text(root / "proc/self/maps"):
        return "musl", ""
    return name, version


def allocator(root: Path, environment: Mapping[str, str]) -> str:
    """The first preloaded library that is known to bring a malloc of its own, empty if there is none."""
    preloaded = f"{environment.get('LD_PRELOAD', '')} {_text(root / 'etc/ld.so.preload')}"
    for library in preloaded.replace(":", " ").split():
        if any(name in Path(library).name for name in _ALLOCATORS):
            return library
    return ""


def old_mkl() -> str:
    """The MKL of Paddle's CPU wheel, found without importing Paddle.

    It is MKLML, which ended with MKL 2019.0.5; MKL ignores MKL_DEBUG_CPU_TYPE since its version 2020.1.
    """
    paddle = importlib.util.find_spec("paddle")
    for folder in (paddle.submodule_search_locations or ()) if paddle else ():
        library = Path(folder, "libs", "libmklml_intel.so")
        if library.exists():
            return str(library)
    return ""


def _isa(flags: str) -> str:
    return next((name for name, needed in _INSTRUCTIONS.items() if needed <= set(flags.split())), "")


def _bound() -> frozenset[int]:
    affinity = getattr(os, "sched_getaffinity", None)
    return frozenset(affinity(0)) if affinity else frozenset(range(os.cpu_count() or 1))


def _chosen(alternatives: str) -> str:
    """Of ``always [madvise] never``, what stands in brackets."""
    return alternatives.partition("[")[2].partition("]")[0]


def _cores(root: Path, bound: frozenset[int]) -> int:
    """How many cores the processors are; one each where the kernel does not say."""
    topology = root / "sys/devices/system/cpu"
    # Processors of one core have the same list.
    siblings = {cpu: _text(topology / f"cpu{cpu}/topology/thread_siblings_list") for cpu in bound}
    return len({text or cpu for cpu, text in siblings.items()})


def _cpu_limits(root: Path) -> Iterator[int]:
    """In processors, of the control groups that this process is in, rounded up; version 2 and version 1."""
    for folder in _groups(root, ""):
        share, _, period = _text(folder / "cpu.max").partition(" ")  # "max 100000", or microseconds per period
        yield from _quota(share, period)
    for folder in _groups(root, "cpu"):
        yield from _quota(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _quota(share: str, period: str) -> Iterator[int]:
    if share.isdecimal() and period.isdecimal() and int(period):  # no limit is "max", or -1
        yield max(1, math.ceil(int(share) / int(period)))


def _memory_limits(root: Path) -> Iterator[int]:
    for controller, name in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
        for folder in _groups(root, controller):
            limit = _text(folder / name)
            if limit.isdecimal():
                yield int(limit)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The control groups of this process under a controller of version 1, or under version 2 (""), upwards.

    Inside a container the path in ``/proc/self/cgroup`` may be the host's, which is not mounted; its end, the
    root of what is mounted, is.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller not in controllers.split(",") or (not controller and number != "0"):
            continue
        mounts = ["", "unified"] if not controller else [controller, controllers]
        for mount in dict.fromkeys(mounts):
            folder = root / "sys/fs/cgroup" / mount
            inside = folder / path.lstrip("/")
            yield from dict.fromkeys([inside, *(above for above in inside.parents if above.is_relative_to(folder))])


def _ranks(environment: Mapping[str, str]) -> int:
    told = environment.get("PADDLE_LOCAL_SIZE", "").strip()
    if not told:
        return 1
    if not told.isdecimal() or int(told) < 1:
        raise ConfigError(
            f"PADDLE_LOCAL_SIZE={told!r} is no number of processes on this host; unset it, or set it to 1 or more "
            "(paddle.distributed.launch does so by itself)"
        )
    return int(told)


def _memory_total(root: Path) -> int:
    size = _field(_text(root / "proc/meminfo"), "MemTotal").partition(" ")[0]
    return int(size) * 1024 if size.isdecimal() else 0


def _field(text: str, name: str) -> str:
    """What stands behind ``name :`` in the first line that begins so."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def _text(path: Path) -> str:
    """What the file holds, without white space around it; nothing where it is not there or not to be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
