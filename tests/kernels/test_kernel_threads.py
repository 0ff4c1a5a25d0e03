"""Kernels beside other threads: Python's, the framework's, and none at all after ``fork()``."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from kernel_harness import make_case

from flatwater import kernels

PROC = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")

# In a process of its own, where nothing has made threads yet.
PRELUDE = """
import os, signal, threading
from concurrent.futures import ThreadPoolExecutor

def os_threads():
    return len(os.listdir("/proc/self/task"))

{framework}
import numpy as np
from flatwater import kernels
from kernel_harness import backward, forward, make_case, same_bits

case = make_case((8, 64, 600), activation="relu", residual=True)

def bits():
    y, moments = forward(case)
    gradients = backward(case, moments)
    return [y, moments.mean, gradients.dx, gradients.dresidual, gradients.sums.dz_xhat]

def same(one, other):
    return all(same_bits(*pair) for pair in zip(one, other, strict=True))
"""


def run(code: str, framework: str = "", **environment: str) -> list[str]:
    """The lines that ``code`` prints after the prelude."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRELUDE.format(framework=framework) + code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\n")[:-1]


PADDLE = "import paddle; paddle.randn([512, 512]).matmul(paddle.randn([512, 512]))"
BESIDE_PADDLE = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer's dlopen does not find Paddle's libraries"
)
FRAMEWORKS = pytest.mark.parametrize(
    "framework", ["", pytest.param(PADDLE, marks=BESIDE_PADDLE)], ids=["alone", "paddle"]
)


def test_the_interpreter_goes_on_while_a_kernel_runs() -> None:
    """Another thread gets its turn during a call: nothing else in the loop below would ever give it one."""
    case = make_case((4, 64, 8000))
    filled = np.empty_like(case.x)
    x, y = case.buffer(case.x), case.buffer(filled)
    mean, m2, inv_std = (np.empty(64) for _ in range(3))
    enough, calls, most = False, 0, 1000

    def work() -> None:
        nonlocal calls
        while not enough and calls < most:
            kernels.batch_norm_forward(x, y, mean=mean, m2=m2, inv_std=inv_std, epsilon=1e-5)
            calls += 1

    before = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # seconds after which a thread that holds the lock is asked for it
    try:
        thread = threading.Thread(target=work)
        thread.start()  # from here on the other thread has the lock
        enough = True
        thread.join()
    finally:
        sys.setswitchinterval(before)
    assert calls < most


@PROC
@FRAMEWORKS
def test_a_team_is_made_once(framework: str) -> None:
    code = """
before = os_threads()
kernels.set_threads(3)
bits()
first = os_threads()
for _ in range(20):
    bits()
print(first - before, os_threads() - first)
"""
    added, later = map(int, run(code, framework)[0].split())
    assert added <= 2
    assert later == 0


@PROC
@BESIDE_PADDLE
def test_the_framework_and_the_kernels_share_one_team() -> None:
    code = """
before = os_threads()
for _ in range(5):
    bits()
    paddle.randn([512, 512]).matmul(paddle.randn([512, 512]))
print(kernels.threads(), os_threads() - before, "libiomp5" in open("/proc/self/maps").read())
"""
    threads, together, shared = run(code, "import paddle", OMP_NUM_THREADS="4")[0].split()
    assert threads == "4"
    if shared == "False":
        pytest.skip("this build of Paddle brings no OpenMP runtime that could be shared")
    assert int(together) <= 3  # besides the one that was there


@PROC
def test_one_thread_makes_none() -> None:
    code = "before = os_threads()\nbits()\nprint(kernels.threads(), os_threads() - before)"
    assert run(code, OMP_NUM_THREADS="1") == ["1 0"]


# What OpenMP would take where nobody asks for anything, on a machine of four processors.
FOUR = "os.environ.pop('OMP_NUM_THREADS', None); _cpu.set_threads(4)"
BEGIN = "kernels.begin((2, 3, 4), 'float32', channels_last=False, activation='none', epsilon=0)"


@pytest.mark.parametrize("first", ["", "bits()", BEGIN], ids=["asked", "a call", "a step"])
@pytest.mark.parametrize(
    ("before", "asked", "threads"),
    [(FOUR, "", "2"), (f"{FOUR}; os.environ['OMP_NUM_THREADS'] = '1'", "", "2"), ("", "3", "3"), ("", "3,2", "3")],
    ids=["nobody", "Paddle, too late", "the user", "the user, in levels"],
)
def test_no_more_threads_than_control_groups_let_run(before: str, asked: str, threads: str, first: str) -> None:
    code = f"""
from flatwater import host
from flatwater.kernels import _cpu
host.usable_processors = lambda: 2
{before}
{first}
print(kernels.threads())
kernels.set_threads(4)
print(kernels.threads())
"""
    assert run(code, OMP_NUM_THREADS=asked) == [threads, "4"]


def test_what_was_set_before_the_first_call_stays() -> None:
    code = "from flatwater import host\nhost.usable_processors = lambda: 2\nkernels.set_threads(5)\nbits()\n"
    assert run(code + "print(kernels.threads())") == ["5"]


def test_how_many_ranks_there_are_is_not_the_kernels_business() -> None:
    code = f"from flatwater.kernels import _cpu\n{FOUR}\nprint(kernels.threads() > 0)"
    assert run(code, OMP_NUM_THREADS="4", PADDLE_LOCAL_SIZE="odd") == ["True"]


@PROC
@FRAMEWORKS
def test_teams_of_threads_that_have_ended_do_not_pile_up(framework: str) -> None:
    """Each Python thread that calls kernels may have a team of its own, for as long as it lives."""
    code = """
kernels.set_threads(2)
expected = bits()

def round_of_calls():
    with ThreadPoolExecutor(3) as pool:
        assert all(same(found, expected) for found in pool.map(lambda _: bits(), range(6)))

round_of_calls()
before = os_threads()
for _ in range(10):
    round_of_calls()
print(os_threads() - before)
"""
    # Ten rounds of three threads with a team of two each; those of one round may still be on their way out.
    assert int(run(code, framework)[0]) <= 6


def test_a_kernel_inside_of_a_parallel_region_is_right() -> None:
    """There OpenMP gives a call fewer threads than it asks for: whoever is there does all of the work."""
    code = """
import ctypes
kernels.set_threads(2)
expected, found = bits(), []
member = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: found.append(bits()))
ctypes.CDLL("libgomp.so.1").GOMP_parallel(member, None, 2, 0)
print(len(found), all(same(each, expected) for each in found))
"""
    assert run(code) == ["2 True"]


# Takes all memory but for small pieces: Python and the team find some, the 7 KiB of a task's columns are not there.
NO_MEMORY = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
kernels.set_threads(2)
case = make_case((4, 127, 100), "float64", channels_last=True, groups=1, affine=False)
y, moments = forward(case)
x, out = case.buffer(case.x), case.buffer(y)
given = {"groups": 1, **moments.normalizing()}
resource.setrlimit(resource.RLIMIT_AS, (1 << 26, resource.RLIM_INFINITY))  # less than is there: nothing is added
held, size = [], 1 << 26
while size >= 1 << 12:
    block = libc.malloc(size)
    if block:
        held.append(block)
    else:
        size //= 2
try:
    kernels.group_normalize(x, out, **given)
    outcome = "enough"
except MemoryError:
    outcome = "MemoryError"
for block in held:
    libc.free(block)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
kernels.group_normalize(x, out, **given)
print(outcome, same_bits(y, forward(case)[0]))
"""


@PROC
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer needs more than any limit")
def test_no_memory_within_a_parallel_region_is_a_memory_error() -> None:
    """It once ended the process. The C library keeps to one arena here: others have memory that they may not have."""
    assert run(NO_MEMORY, MALLOC_ARENA_MAX="1") == ["MemoryError True"]


# With GNU's runtime, and with Intel's, which Paddle brings.
CHILDREN = pytest.mark.parametrize(
    "framework",
    ["", pytest.param(PADDLE, marks=BESIDE_PADDLE)],
    ids=["alone", "paddle"],
)

FORK = """
kernels.set_threads(3)
expected = bits()
child = os.fork()
if child == 0:
    signal.alarm(10)  # a child that waits for a team which it has not got would wait for ever
    right = same(bits(), expected)
    kernels.set_threads(2)
    os._exit(0 if right and same(bits(), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same(bits(), expected))
"""


@CHILDREN
def test_a_child_computes_as_its_parent_does(framework: str) -> None:
    assert run(FORK, framework) == ["0 True"]


@CHILDREN
def test_a_child_of_another_thread_computes_too(framework: str) -> None:
    """As a data loader's workers are: forked where the kernels have run in another thread, or never."""
    indented = "\n".join("    " + line for line in FORK.splitlines())
    code = f"bits()\ndef work():\n{indented}\nthread = threading.Thread(target=work)\nthread.start()\nthread.join()"
    assert run(code, framework) == ["0 True"]
