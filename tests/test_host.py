"""The host: what is found out about it, what follows, and what of that can still be done in a running process."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatwater import host
from flatwater.host import Decision, Host
from flatwater.host.facts import cpus_of

AMD = Host(
    vendor="AuthenticAMD",
    isa="avx2",
    processors=4,
    bound_to=4,
    cores=4,
    memory=16 << 30,
    libc="glibc",
    libc_version="2.36",
    mkl="/wheel/libmklml_intel.so",
)


def values(of: Host) -> dict[str, str]:
    return {setting.variable: setting.value for setting in host.settings(of)}


def why_not(of: Host, variable: str) -> str:
    found = {decision.variable: decision for decision in host.decisions(of)}[variable]
    assert found.value is None
    return found.reason


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


# --- Facts ---------------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 300)))
def test_a_list_of_processors_is_read_as_the_kernel_writes_it(cpus: set[int]) -> None:
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][-1] == cpu - 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    written = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    assert cpus_of(f"{written}\n") == cpus


def test_nothing_known_is_one_processor_each_and_no_setting_of_a_vendors(tmp_path: Path) -> None:
    found = Host.look(tmp_path, {})
    assert (found.vendor, found.isa, found.memory, found.allocator, found.huge_pages) == ("", "", 0, "", "")
    assert found.processors == found.cores == found.bound_to >= 1


def test_processor_and_memory_are_read_from_proc(tmp_path: Path) -> None:
    root = lay(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx fma avx2 avx512f\n",
            "proc/meminfo": "MemTotal:        2048 kB\nMemFree: 1 kB\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        },
    )
    found = Host.look(root, {})
    assert (found.vendor, found.isa, found.memory, found.huge_pages) == ("AuthenticAMD", "avx2", 2 << 20, "madvise")


def test_all_of_avx512_is_needed_for_its_name(tmp_path: Path) -> None:
    flags = "fma avx2 avx512f avx512cd avx512bw avx512dq avx512vl"
    assert Host.look(lay(tmp_path, {"proc/cpuinfo": f"flags : {flags}\n"}), {}).isa == "avx512"


def test_musl_is_known_by_its_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert Host.look(tmp_path, {}).libc == ""
    maps = "7f0-7f1 r-xp 00000000 08:01 9  /lib/ld-musl-x86_64.so.1\n"
    assert Host.look(lay(tmp_path, {"proc/self/maps": maps}), {}).libc == "musl"


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"},
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"},
        {"proc/self/cgroup": "0::/not/mounted/here\n", "sys/fs/cgroup/cpu.max": "30000 100000\n"},
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/pod\n0::/\n",
            "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000",
        },
    ],
    ids=["own group", "group above", "container", "version 1"],
)
def test_a_limit_of_processors_counts(tmp_path: Path, files: dict[str, str]) -> None:
    assert Host.look(lay(tmp_path, files), {}).processors == 1


@given(
    st.lists(st.none() | st.tuples(st.integers(1, 10**7), st.integers(1000, 10**6)), max_size=4),
    st.integers(1, 64),
)
@settings(deadline=None, max_examples=30)
def test_the_tightest_limit_of_all_groups_above_counts(levels: list[tuple[int, int] | None], bound: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sched_getaffinity", lambda _: set(range(bound)), raising=False)
        groups = ["/".join("g" * depth) for depth in range(len(levels))]
        files = {"proc/self/cgroup": f"1:name=systemd:/\n0::/{groups[-1] if groups else ''}\n"}
        for group, limit in zip(groups, levels, strict=True):
            written = "max 100000" if limit is None else f"{limit[0]} {limit[1]}"
            files[f"sys/fs/cgroup/{group}/cpu.max"] = f"{written}\n"
        found = Host.look(lay(Path(folder), files), {})
    limits = [-(-limit[0] // limit[1]) for limit in levels if limit is not None]
    assert (found.processors, found.bound_to) == (min([bound, *limits]), bound)


@given(
    st.dictionaries(
        st.sampled_from(["proc/self/cgroup", "proc/cpuinfo", "proc/meminfo"]), st.text("0:/\n max-²", max_size=30)
    )
)
@settings(deadline=None, max_examples=30)
def test_no_file_of_the_kernels_is_taken_on_trust(files: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        limits = dict.fromkeys(["sys/fs/cgroup/cpu.max", "sys/fs/cgroup/memory.max"], "² x")
        assert Host.look(lay(Path(folder), files | limits), {}).processors >= 1


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"},
        {
            "proc/self/cgroup": "1:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        {"proc/self/cgroup": "0::/other\n", "sys/fs/cgroup/a/cpu.max": "10000 100000\n"},
    ],
    ids=["version 2", "version 1", "another's"],
)
def test_no_limit_is_none(tmp_path: Path, files: dict[str, str]) -> None:
    found = Host.look(lay(tmp_path, files), {})
    assert found.processors == found.bound_to


def test_a_limit_of_memory_counts(tmp_path: Path) -> None:
    meminfo = {"proc/meminfo": "MemTotal: 1048576 kB\n"}
    for files in (
        {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "4096\n"},
        {"proc/self/cgroup": "3:memory:/a\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "4096\n"},
    ):
        assert Host.look(lay(tmp_path, meminfo | files), {}).memory == 4096


def test_threads_that_share_a_core_are_one_core(tmp_path: Path) -> None:
    bound = sorted(os.sched_getaffinity(0))
    name = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    together = ",".join(map(str, bound))
    root = lay(tmp_path, {name.format(cpu): together for cpu in bound})
    assert Host.look(root, {}).cores == 1


def test_a_preloaded_allocator_is_found(tmp_path: Path) -> None:
    assert Host.look(tmp_path, {"LD_PRELOAD": "/x/libfoo.so:/y/libjemalloc.so.2"}).allocator == "/y/libjemalloc.so.2"
    assert Host.look(tmp_path, {"LD_PRELOAD": "/x/jemalloc/libfoo.so"}).allocator == ""
    assert "tcmalloc" in Host.look(lay(tmp_path, {"etc/ld.so.preload": "/z/libtcmalloc.so\n"}), {}).allocator


# --- What follows from them -----------------------------------------------------------------------------


def test_mkl_is_redirected_where_an_old_one_runs_on_amd() -> None:
    assert values(AMD)["MKL_DEBUG_CPU_TYPE"] == "5"
    assert values(replace(AMD, isa="avx512"))["MKL_DEBUG_CPU_TYPE"] == "7"
    assert "AMD" in why_not(replace(AMD, vendor="GenuineIntel"), "MKL_DEBUG_CPU_TYPE")
    assert "AVX2" in why_not(replace(AMD, isa=""), "MKL_DEBUG_CPU_TYPE")
    assert "no MKL" in why_not(replace(AMD, mkl=""), "MKL_DEBUG_CPU_TYPE")


def test_allocator_thresholds_are_for_glibcs_malloc_only() -> None:
    assert values(AMD)["MALLOC_MMAP_THRESHOLD_"] == str(8 << 30)
    assert "another" in why_not(replace(AMD, libc="", libc_version=""), "MALLOC_MMAP_THRESHOLD_")
    assert "musl" in why_not(replace(AMD, libc="musl", libc_version=""), "MALLOC_MMAP_THRESHOLD_")
    assert "libjemalloc.so" in why_not(replace(AMD, allocator="/x/libjemalloc.so"), "MALLOC_TRIM_THRESHOLD_")


@pytest.mark.parametrize("version", ["2.17", "2.34", ""])
def test_a_glibc_that_limits_the_threshold_is_told_never_to_map(version: str) -> None:
    old = values(replace(AMD, libc_version=version))
    assert old["MALLOC_MMAP_MAX_"] == "0"
    assert "MALLOC_MMAP_THRESHOLD_" not in old, "it would be ignored, and 128 KiB stay"
    assert "MALLOC_MMAP_MAX_" not in values(replace(AMD, libc_version="2.35"))


def test_a_small_host_keeps_no_more_than_it_has() -> None:
    small = values(replace(AMD, memory=1 << 30))
    assert int(small["MALLOC_TRIM_THRESHOLD_"]) == 1 << 30
    assert int(small["MALLOC_TOP_PAD_"]) == 16 << 20


def test_threads_are_the_processors_this_process_may_use() -> None:
    assert values(replace(AMD, processors=3))["OMP_NUM_THREADS"] == "3"


def test_what_the_user_set_is_left_alone() -> None:
    assert "OMP_NUM_THREADS" in {setting.variable for setting in host.missing({})}
    assert "OMP_NUM_THREADS" not in {setting.variable for setting in host.missing({"OMP_NUM_THREADS": "1"})}


@pytest.mark.parametrize(
    ("environment", "state"),
    [
        ({}, "missing"),
        ({"MALLOC_TOP_PAD_": "268435456"}, "already"),
        ({"MALLOC_TOP_PAD_": "1"}, "yours"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.top_pad=1"}, "yours"),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}, "missing"),
    ],
)
def test_how_an_environment_stands_to_what_is_needed(environment: dict[str, str], state: str) -> None:
    decision = {decision.variable: decision for decision in host.decisions(AMD)}["MALLOC_TOP_PAD_"]
    assert host.standing(decision, environment) == state


def test_what_is_set_though_not_needed_is_the_users() -> None:
    decision = Decision("MKL_DEBUG_CPU_TYPE", None, "no need")
    assert host.standing(decision, {}) == "not needed"
    assert host.standing(decision, {"MKL_DEBUG_CPU_TYPE": "5"}) == "yours"
