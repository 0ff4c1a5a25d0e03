from __future__ import annotations

import subprocess
import sys

import pytest

from flatwater import host
from flatwater.errors import BackendError

AMD = "vendor_id : AuthenticAMD\nflags : fpu sse4_2 avx avx2"
INTEL = "vendor_id : GenuineIntel\nflags : fpu sse4_2 avx avx2"


def variables(**stand_ins: object) -> dict[str, str]:
    return {setting.variable: setting.value for setting in host.settings(**stand_ins)}  # type: ignore[arg-type]


def test_mkl_is_redirected_on_amd_with_avx2_only() -> None:
    assert variables(cpuinfo=AMD)["MKL_DEBUG_CPU_TYPE"] == "5"
    assert "MKL_DEBUG_CPU_TYPE" not in variables(cpuinfo=INTEL)
    assert "MKL_DEBUG_CPU_TYPE" not in variables(cpuinfo=AMD.replace("avx2", ""))


def test_allocator_thresholds_are_for_glibc_only() -> None:
    assert "MALLOC_MMAP_THRESHOLD_" in variables(libc="glibc")
    assert not any(name.startswith("MALLOC") for name in variables(libc="musl"))


def test_threads_are_the_processors_this_process_may_use() -> None:
    assert variables(processors=3)["OMP_NUM_THREADS"] == "3"


def test_what_the_user_set_is_left_alone() -> None:
    assert "OMP_NUM_THREADS" in {setting.variable for setting in host.missing({})}
    assert "OMP_NUM_THREADS" not in {setting.variable for setting in host.missing({"OMP_NUM_THREADS": "1"})}


def test_launch_runs_the_command_with_the_settings_and_keeps_the_users() -> None:
    show = "import os; print(os.environ['OMP_NUM_THREADS'], sorted(k for k in os.environ if k.startswith('MALLOC_')))"
    code = (
        "import os, sys; from flatwater import host\n"
        "os.environ['OMP_NUM_THREADS'] = '7'\n"
        "[os.environ.pop(s.variable, None) for s in host.settings() if s.variable.startswith('MALLOC')]\n"
        f"host.launch([sys.executable, '-c', {show!r}])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = sorted(setting.variable for setting in host.settings() if setting.variable.startswith("MALLOC"))
    assert result.stdout.strip() == f"7 {expected}"


def test_a_program_that_does_not_exist_is_named() -> None:
    with pytest.raises(BackendError, match="no-such-program"):
        host.launch(["no-such-program"])
