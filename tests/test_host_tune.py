"""What the host needs, put into effect: in a process that runs already, and in one that is started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from flatwater import host
from flatwater.errors import LaunchError
from flatwater.host import Host
from flatwater.host.settings import kept_by_malloc

# On one processor nothing is needed, so that the 1 which Paddle's import leaves in the environment may be anybody's.
ONE = Host.look().bound_to == 1
NEEDED = {setting.variable: setting.value for setting in host.settings()}


def run(code: str, **environment: str) -> str:
    """What a process without any of the settings prints; of them it has those in ``environment`` alone."""
    known = {decision.variable for decision in host.decisions()} | {"GLIBC_TUNABLES"}
    clean = {name: value for name, value in os.environ.items() if name not in known} | environment
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=clean)
    assert result.returncode == 0, result.stderr
    return result.stdout


def on(processors: int, bound_to: int = 4) -> str:
    """Code for which this host has so many processors, whatever there is, and needs a number of threads only."""
    found = f"Host(processors={processors}, bound_to={bound_to}, cores={bound_to})"
    return f"from flatwater.host import Host\nHost.look = classmethod(lambda cls: {found})\n"


EFFECTS = "import json, flatwater as fw; print(json.dumps({e.variable: e.state for e in fw.host.tune()}))"


def test_tune_sets_what_the_host_needs_before_a_framework_is_imported() -> None:
    needed = {decision.variable: decision.value for decision in host.decisions()}
    states = json.loads(run(EFFECTS))
    assert states == {name: "not needed" if value is None else "set" for name, value in needed.items()}


def test_what_tune_has_set_is_there_for_children_and_for_a_second_call() -> None:
    once, twice, environment = json.loads(
        run(
            "import json, os, flatwater as fw\n"
            "calls = [{effect.variable: effect.state for effect in fw.host.tune()} for _ in range(2)]\n"
            "print(json.dumps([*calls, dict(os.environ)]))"
        )
    )
    assert {name: environment.get(name) for name in NEEDED} == NEEDED
    assert "set" in once.values()
    assert set(twice.values()) <= {"already", "not needed"}


def test_tune_says_what_comes_too_late_once_mkl_is_loaded() -> None:
    states = json.loads(
        run(f"import paddle; paddle.set_device('cpu')\npaddle.ones([2, 2]) @ paddle.ones([2, 2])\n{EFFECTS}")
    )
    assert states["MKL_DEBUG_CPU_TYPE"] in ("too late", "not needed")
    assert states["OMP_NUM_THREADS"] in (("yours",) if ONE else ("set", "already")), "there is a call for that"
    assert states["MALLOC_TOP_PAD_"] in ("set", "not needed")


def test_after_paddles_import_threads_and_mkl_can_still_be_told() -> None:
    threads, maps, states = json.loads(
        run(
            "import json, os, paddle, flatwater as fw\n"
            "paddle.set_device('cpu')\n"
            "states = {effect.variable: effect.state for effect in fw.host.tune()}\n"
            "from flatwater.host.tune import _loaded, _runtimes\n"
            "threads = [runtime.omp_get_max_threads() for runtime in _runtimes(_loaded())]\n"
            "print(json.dumps([threads, list(_loaded()), states]))"
        )
    )
    assert not any(name.startswith("libmklml") for name in maps), "it has read nothing yet"
    assert states.pop("OMP_NUM_THREADS") in (("yours",) if ONE else ("set", "already"))
    assert set(states.values()) <= {"set", "already", "not needed"}
    assert set(threads) == {int(NEEDED.get("OMP_NUM_THREADS", "1"))}


@pytest.mark.parametrize("before", ["", "import os; os.environ['OMP_NUM_THREADS'] = '1'\n"])
def test_one_thread_of_the_users_is_not_taken_for_paddles(before: str) -> None:
    environment = {} if before else {"OMP_NUM_THREADS": "1"}
    states = json.loads(run(f"{before}import paddle; paddle.set_device('cpu')\n{on(3)}{EFFECTS}", **environment))
    assert states["OMP_NUM_THREADS"] == "yours"


@pytest.mark.parametrize("used", ["", "kernels.threads()\n"], ids=["imported", "used"])
def test_kernels_that_are_loaded_take_the_threads_that_tune_sets(used: str) -> None:
    code = f"import flatwater as fw\nfrom flatwater import kernels\n{used}{on(3)}fw.host.tune()\n"
    assert run(f"{code}print(kernels.threads())") == "3\n"
    elsewhere = "thread = threading.Thread(target=lambda: print(kernels.threads()))"
    assert run(f"import threading\n{code}{elsewhere}\nthread.start()\nthread.join()") == "3\n"


def test_threads_that_a_program_has_chosen_for_the_kernels_stay() -> None:
    code = f"import flatwater as fw\nfrom flatwater import kernels\nkernels.set_threads(5)\n{on(3)}fw.host.tune()\n"
    assert run(f"{code}print(kernels.threads())") == "5\n"


def test_kernels_keep_to_a_limit_of_one_processor_beside_paddles_own_1() -> None:
    code = f"import paddle\nfrom flatwater import host, kernels\n{on(1)}host.tune()\nprint(kernels.threads())"
    assert run(code) == "1\n"


def test_the_pool_leaves_to_the_c_library_what_it_keeps_once_it_is_tuned() -> None:
    untuned, tuned = json.loads(
        run(
            "import json, flatwater as fw, flatwater.paddle\n"
            "from flatwater.paddle import memory\n"
            "untuned = memory._POOLED_FROM\n"
            "fw.host.tune()\n"
            "print(json.dumps([untuned, memory._POOLED_FROM]))"
        )
    )
    assert untuned == 1 << 18
    assert tuned == max(untuned, kept_by_malloc(NEEDED))


def test_tune_keeps_what_the_user_set() -> None:
    assert json.loads(run(EFFECTS, OMP_NUM_THREADS="7"))["OMP_NUM_THREADS"] == "yours"
    assert json.loads(run(EFFECTS, MALLOC_TOP_PAD_="1"))["MALLOC_TOP_PAD_"] in ("yours", "not needed")


@pytest.mark.skipif("MALLOC_TRIM_THRESHOLD_" not in NEEDED, reason="the allocator is not glibc's malloc")
@pytest.mark.parametrize(
    "allocate",
    [
        "import numpy\ndef allocate(): numpy.ones(16 << 20, numpy.float32)\n",
        "import paddle\npaddle.set_device('cpu')\ndef allocate(): paddle.ones([16 << 20])\n",
    ],
    ids=["numpy", "paddle"],
)
def test_freed_arrays_stay_in_the_process_once_it_is_tuned(allocate: str) -> None:
    faults = json.loads(
        run(
            f"{allocate}"
            "import json, resource, flatwater as fw\n"
            "def faults():\n"
            "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "    for _ in range(4): allocate()\n"
            "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
            "faults()\n"
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
    expected = sorted(name for name in NEEDED if name.startswith("MALLOC_"))
    assert printed.strip() == f"7 {expected}"


@pytest.mark.parametrize("command", [["no-such-program"], [""], []])
def test_a_program_that_does_not_exist_is_named(command: list[str]) -> None:
    with pytest.raises(LaunchError, match=f"cannot run '{''.join(command)}'.*; (check|give)") as caught:
        host.launch(command)
    assert caught.value.status == 127


def test_launch_leaves_signals_as_a_shell_has_them() -> None:
    command = ["sh", "-c", "grep SigIgn /proc/self/status"]
    result = run(f"from flatwater import host; host.launch({command!r})")
    ignored = int(result.split()[1], 16)
    assert not ignored & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1))
