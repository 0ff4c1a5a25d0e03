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
from flatwater.errors import ConfigError
from flatwater.host import Decision, Host
from flatwater.host.settings import kept_by_malloc

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
        siblings = [
            f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in range(os.cpu_count() or 1)
        ]
        limits = dict.fromkeys(["sys/fs/cgroup/cpu.max", "sys/fs/cgroup/memory.max", *siblings], "² x")
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


def test_threads_that_share_a_core_are_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 4, 5, 7}, raising=False)
    name = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    root = lay(tmp_path, {name.format(cpu): f"{cpu % 4},{cpu % 4 + 4}\n" for cpu in (0, 1, 2, 4, 5)})
    assert Host.look(root, {}).cores == 4, "0 and 4, 1 and 5, 2 without 6, and 7, of which nothing is said"


def test_the_ranks_of_paddles_launcher_are_counted(tmp_path: Path) -> None:
    assert Host.look(tmp_path, {"PADDLE_LOCAL_SIZE": "3"}).ranks == 3
    assert Host.look(tmp_path, {"PADDLE_LOCAL_SIZE": ""}).ranks == 1


@pytest.mark.parametrize("told", ["abc", "-3", "0", "1.5"])
def test_what_is_no_number_of_ranks_is_named(tmp_path: Path, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"PADDLE_LOCAL_SIZE='{told}' .* unset it"):
        Host.look(tmp_path, {"PADDLE_LOCAL_SIZE": told})


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


@pytest.mark.parametrize(
    ("processors", "bound_to", "cores", "ranks", "threads", "reason"),
    [
        (8, 8, 8, 1, "8", "one a processor"),
        (3, 8, 8, 1, "3", "a control group limits 8 processors to 3"),
        (1, 8, 8, 1, "1", "a control group limits 8 processors to 1"),
        (8, 8, 4, 1, "4", "one a core: the 8 processors are 4 cores"),
        (6, 8, 4, 1, "4", "one a core: the 8 processors are 4 cores"),
        (3, 8, 4, 1, "3", "a control group limits 8 processors to 3"),
        (2, 2, 1, 1, "1", "one a core: the 2 processors are 1 core"),
        (8, 8, 8, 3, "2", "3 ranks share 8 processors"),
        (8, 8, 4, 2, "2", "2 ranks share 4 cores"),
        (2, 2, 2, 5, "1", "5 ranks share 2 processors"),
    ],
)
def test_threads_are_the_cores_this_process_may_use(
    processors: int, bound_to: int, cores: int, ranks: int, threads: str, reason: str
) -> None:
    found = replace(AMD, processors=processors, bound_to=bound_to, cores=cores, ranks=ranks)
    setting = {setting.variable: setting for setting in host.settings(found)}["OMP_NUM_THREADS"]
    assert setting.value == threads
    assert setting.reason.startswith(reason)


def test_one_processor_needs_no_number_of_threads() -> None:
    assert "one processor" in why_not(replace(AMD, processors=1, bound_to=1, cores=1), "OMP_NUM_THREADS")


def test_what_the_user_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "look", lambda: AMD)
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
        ({"GLIBC_TUNABLES": "glibc.malloc.top_pad=1", "MALLOC_TOP_PAD_": "268435456"}, "yours"),
        ({"GLIBC_TUNABLES": "glibc.malloc.top_pad=1:glibc.malloc.top_pad=268435456"}, "already"),
    ],
)
def test_how_an_environment_stands_to_what_is_needed(environment: dict[str, str], state: str) -> None:
    decision = {decision.variable: decision for decision in host.decisions(AMD)}["MALLOC_TOP_PAD_"]
    assert host.standing(decision, environment) == state


GIB = 1 << 30
BOTH = {"MALLOC_MMAP_THRESHOLD_": str(GIB), "MALLOC_TRIM_THRESHOLD_": str(2 * GIB)}


@pytest.mark.parametrize(
    ("environment", "version", "kept"),
    [
        ({}, "2.36", 0),
        (BOTH, "2.36", GIB),
        (BOTH | {"MALLOC_TRIM_THRESHOLD_": "-1"}, "2.36", GIB),
        (BOTH | {"MALLOC_TRIM_THRESHOLD_": "1e9"}, "2.36", 0),
        ({"MALLOC_MMAP_THRESHOLD_": str(GIB)}, "2.36", 0),
        (BOTH, "2.34", 0),
        (BOTH | {"MALLOC_MMAP_THRESHOLD_": str(32 << 20)}, "2.34", 32 << 20),
        ({"MALLOC_MMAP_MAX_": "0"}, "2.36", 0),
        ({"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(GIB)}, "2.34", GIB),
        (BOTH | {"MALLOC_MMAP_MAX_": "65536"}, "2.36", GIB),
        ({"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={GIB}:glibc.malloc.trim_threshold={GIB}"}, "2.36", GIB),
        ({"GLIBC_TUNABLES": f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={GIB}"}, "2.36", GIB),
        (BOTH | {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1024"}, "2.36", 1024),
        (BOTH | {"LD_PRELOAD": "/x/libjemalloc.so.2"}, "2.36", 0),
        (BOTH | {"LD_PRELOAD": "libtcmalloc_minimal.so.4"}, "2.36", 0),
        (BOTH | {"LD_PRELOAD": "/x/libmimalloc.so:/y/other.so"}, "2.36", 0),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_what_malloc_keeps_is_what_glibc_reads(
    environment: dict[str, str], version: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", version))
    assert kept_by_malloc(environment, tmp_path) == kept


def test_another_c_library_keeps_nothing_by_glibcs_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert kept_by_malloc(BOTH, tmp_path) == 0


@pytest.mark.parametrize("version", ["2.17", "2.36"])
def test_what_a_host_with_glibc_needs_makes_malloc_keep_large_tensors(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", version))
    assert kept_by_malloc(values(replace(AMD, libc_version=version)), tmp_path) >= 8 * GIB


def test_what_is_set_though_not_needed_is_the_users() -> None:
    decision = Decision("MKL_DEBUG_CPU_TYPE", None, "no need")
    assert host.standing(decision, {}) == "not needed"
    assert host.standing(decision, {"MKL_DEBUG_CPU_TYPE": "5"}) == "yours"
