"""The host: what is found out about it, what follows, and what of that can still be done in a running process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatwater import host
from flatwater.errors import BackendError
from flatwater.host import Host
from flatwater.host.facts import cpus_of

AMD = Host("AuthenticAMD", True, 4, 4, 4, 16 << 30, "glibc", "", "/wheel/libmklml_intel.so")


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
    assert (found.vendor, found.avx2, found.memory, found.allocator) == ("", False, 0, "")
    assert found.processors == found.cores == found.bound_to >= 1


def test_processor_and_memory_are_read_from_proc(tmp_path: Path) -> None:
    root = lay(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx avx2\n",
            "proc/meminfo": "MemTotal:        2048 kB\nMemFree: 1 kB\n",
        },
    )
    found = Host.look(root, {})
    assert (found.vendor, found.avx2, found.memory) == ("AuthenticAMD", True, 2 << 20)


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


def test_mkl_is_redirected_where_an_old_one_runs_on_amd_with_avx2() -> None:
    assert values(AMD)["MKL_DEBUG_CPU_TYPE"] == "5"
    assert "by itself" in why_not(replace(AMD, vendor="GenuineIntel"), "MKL_DEBUG_CPU_TYPE")
    assert "AVX2" in why_not(replace(AMD, avx2=False), "MKL_DEBUG_CPU_TYPE")
    assert "no MKL" in why_not(replace(AMD, mkl=""), "MKL_DEBUG_CPU_TYPE")


def test_allocator_thresholds_are_for_glibcs_malloc_only() -> None:
    assert values(AMD)["MALLOC_MMAP_THRESHOLD_"] == str(8 << 30)
    assert "glibc" in why_not(replace(AMD, libc=""), "MALLOC_MMAP_THRESHOLD_")
    assert "libjemalloc.so" in why_not(replace(AMD, allocator="libjemalloc.so"), "MALLOC_TRIM_THRESHOLD_")


def test_a_small_host_keeps_no_more_than_it_has() -> None:
    small = values(replace(AMD, memory=1 << 30))
    assert int(small["MALLOC_TRIM_THRESHOLD_"]) == 1 << 30
    assert int(small["MALLOC_TOP_PAD_"]) == 16 << 20


def test_threads_are_the_processors_this_process_may_use() -> None:
    assert values(replace(AMD, processors=3))["OMP_NUM_THREADS"] == "3"


def test_what_the_user_set_is_left_alone() -> None:
    assert "OMP_NUM_THREADS" in {setting.variable for setting in host.missing({})}
    assert "OMP_NUM_THREADS" not in {setting.variable for setting in host.missing({"OMP_NUM_THREADS": "1"})}


# --- Into effect ----------------------------------------------------------------------------------------


def run(code: str, **environment: str) -> str:
    """What a process without any of the settings prints; it has no others than ``environment``."""
    known = {decision.variable for decision in host.decisions()}
    clean = {name: value for name, value in os.environ.items() if name not in known} | environment
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=clean)
    assert result.returncode == 0, result.stderr
    return result.stdout


EFFECTS = "import json, flatwater as fw; print(json.dumps({e.variable: e.state for e in fw.host.tune()}))"


def test_tune_sets_what_the_host_needs_before_a_framework_is_imported() -> None:
    needed = {decision.variable: decision.value for decision in host.decisions()}
    states = json.loads(run(EFFECTS))
    assert states == {name: "not needed" if value is None else "set" for name, value in needed.items()}


def test_tune_says_what_comes_too_late_after_paddle() -> None:
    states = json.loads(run(f"import paddle; paddle.set_device('cpu')\n{EFFECTS}"))
    assert states["OMP_NUM_THREADS"] == "too late"
    assert states["MKL_DEBUG_CPU_TYPE"] in ("too late", "not needed")
    assert states["MALLOC_TOP_PAD_"] in ("set", "not needed")


def test_tune_keeps_what_the_user_set() -> None:
    assert json.loads(run(EFFECTS, OMP_NUM_THREADS="7"))["OMP_NUM_THREADS"] == "yours"
    assert json.loads(run(EFFECTS, MALLOC_TOP_PAD_="1"))["MALLOC_TOP_PAD_"] in ("yours", "not needed")


@pytest.mark.skipif("MALLOC_MMAP_THRESHOLD_" not in values(Host.look()), reason="the allocator is not glibc's malloc")
def test_freed_arrays_stay_in_the_process_once_it_is_tuned() -> None:
    faults = json.loads(
        run(
            "import json, resource, numpy as np, flatwater as fw\n"
            "def faults():\n"
            "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "    for _ in range(4): np.ones(16 << 20, np.float32)\n"
            "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
            "untuned = faults()\n"
            "fw.host.tune()\n"
            "faults()\n"
            "print(json.dumps([untuned, faults()]))"
        )
    )
    # 64 MiB, four times: at least 32 pages each if they are huge ones, 16384 if not. Afterwards, next to none.
    assert faults[0] >= 100
    assert faults[1] <= 10


def test_launch_runs_the_command_with_the_settings_and_keeps_the_users() -> None:
    show = "import os; print(os.environ['OMP_NUM_THREADS'], sorted(k for k in os.environ if k.startswith('MALLOC_')))"
    printed = run(
        f"import sys; from flatwater import host; host.launch([sys.executable, '-c', {show!r}])", OMP_NUM_THREADS="7"
    )
    expected = sorted(setting.variable for setting in host.settings() if setting.variable.startswith("MALLOC"))
    assert printed.strip() == f"7 {expected}"


def test_a_program_that_does_not_exist_is_named() -> None:
    with pytest.raises(BackendError, match="no-such-program"):
        host.launch(["no-such-program"])
