"""What may not change a result: how many threads run, which call they run in; and every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from kernel_harness import Case, backward, forward, make_case, same_bits

from flatwater import kernels

# Each large enough for a team of threads: channels as tasks, planes as tasks (few channels), rows of small
# planes, many rows of few columns, one sample.
SHAPES = ((4, 24, 333), (7, 2, 1999), (31, 40, 49), (3001, 9, 1), (1, 64, 300), (9, 8, 130), (1, 3, 9001))
BATCH_AND_GROUPS = pytest.mark.parametrize("groups", [None, 1, -1], ids=["batch", "layer", "instance"])


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = kernels.threads()
    yield
    kernels.set_threads(before)


def bits(case: Case) -> list[np.ndarray]:
    y, moments = forward(case)
    gradients = backward(case, moments)
    halves = [np.zeros(case.sets), np.zeros(case.sets)]
    if case.groups is None:
        kernels.batch_statistics(case.buffer(case.x), *halves)
    return [
        y, moments.mean, moments.m2, moments.inv_std, *halves,
        gradients.dx, gradients.dresidual, gradients.sums.dz, gradients.sums.dz_xhat,
    ]  # fmt: skip


@BATCH_AND_GROUPS
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCL", "NLC"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_same_bits_for_any_number_of_threads(dtype: str, channels_last: bool, groups: int | None) -> None:
    for shape in SHAPES:
        case = make_case(
            shape,
            dtype,
            channels_last=channels_last,
            activation="swish",
            residual=True,
            groups=shape[1] if groups == -1 else groups,
        )
        kernels.set_threads(1)
        alone = bits(case)
        for threads in (2, 3, 5, 8):
            kernels.set_threads(threads)
            assert kernels.threads() == threads
            assert all(same_bits(one, other) for one, other in zip(bits(case), alone, strict=True)), (shape, threads)


@pytest.mark.parametrize("count", [3, np.int64(3), np.uint8(3)], ids=lambda count: type(count).__name__)
def test_any_integer_is_a_number_of_threads(count: int) -> None:
    kernels.set_threads(count)
    assert kernels.threads() == 3


def test_calls_at_the_same_time_do_not_meet() -> None:
    """The interpreter's lock is released, so Python threads run kernels side by side."""
    cases = [make_case((5, 31, 211), activation="relu", residual=True, seed=seed) for seed in range(8)]
    expected = [bits(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for actual, alone in zip(pool.map(bits, cases), expected, strict=True):
                assert all(same_bits(one, other) for one, other in zip(actual, alone, strict=True))


# --- Instruction sets ------------------------------------------------------------------------------------

FLAGS = {"baseline": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}

CHECK_EVERYTHING = """
from itertools import product
from flatwater import kernels
from flatwater.spec import ACTIVATIONS
from kernel_harness import DTYPES, SHAPES, check_backward, check_forward, check_rounding, make_case
assert kernels.isa() == {isa!r}, kernels.isa()
check_rounding()
for seed, (dtype, activation, channels_last) in enumerate(product(DTYPES, ACTIVATIONS, [False, True])):
    for shape in SHAPES:
        for groups in (None, 1):
            case = make_case(shape, dtype, channels_last=channels_last, activation=activation,
                             residual=seed % 3 > 0, groups=groups, offset=seed % 5, seed=seed)
            check_forward(case, offset=seed % 7)
            check_backward(case, frozen=groups is None and seed % 4 == 0, offset=seed % 3)
"""


NAME_THE_ERROR = (
    "from flatwater import kernels, errors\n"
    "try:\n    kernels.isa()\nexcept errors.BackendError as error:\n    print(error)"
)


def run_under(isa: str, code: str, tuning: str = "") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"FLATWATER_ISA": isa, "FLATWATER_TUNING": tuning, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("isa", FLAGS)
def test_every_instruction_set_is_right(isa: str) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set()
    if not flags >= FLAGS[isa]:
        pytest.skip(f"this processor does not run {isa}")
    result = run_under(isa, CHECK_EVERYTHING.format(isa=isa))
    assert result.returncode == 0, result.stderr


def test_an_instruction_set_that_is_not_there_is_named() -> None:
    result = run_under("mmx", NAME_THE_ERROR)
    assert result.returncode == 0, result.stderr
    assert "mmx" in result.stdout


# Rows of more columns than a tile of them: so many that its sums leave the first-level cache, and more than that; with
# one thread, as few rows make more than one chunk. And short planes, which some machines write past the caches, and
# planes and many rows, which some ask for into another cache; and channels and groups that are written
# without having been asked for as a whole.
READ_AND_WRITTEN = """
import hashlib
from flatwater import kernels
from kernel_harness import backward, check_backward, check_forward, forward, make_case
kernels.set_threads(1)
found = hashlib.sha256()

def add_bits(case):
    y, moments = forward(case)
    result = backward(case, moments)
    for array in (y, moments.mean, moments.m2, result.dx, result.dresidual, result.sums.dz, result.sums.dz_xhat):
        if array is not None:
            found.update(array.tobytes())

for dtype in ("float32", "bfloat16", "float64"):
    rows = (3, 1000, 101), (2, 2048, 130), (67, 3001, 2), (5, 4100, 31), (200, 513, 1)
    planes = (33, 40, 49), (3, 5, 197), (2, 3, 9001), (1400, 3, 61), (2, 1400, 61)
    for shape in rows + planes:
        last = shape in rows
        for groups in (None, 1, shape[1]):
            case = make_case(shape, dtype, channels_last=last, activation="relu", residual=True, groups=groups)
            check_forward(case)
            check_backward(case)
            add_bits(case)
for shape, residual in (((64, 337, 197), True), ((64, 337, 211), False), ((16, 300, 999), True)):
    add_bits(make_case(shape, activation="relu", residual=residual))
for shape, groups in (((16, 31, 15_000), None), ((8, 1030, 920), None), ((16, 71, 6_600), 1)):
    add_bits(make_case(shape, channels_last=True, activation="relu", residual=True, groups=groups))
# Of sizes that some stream and others do not.
add_bits(make_case((16, 31, 3_300), channels_last=True, activation="relu"))
for length in (197, 1999):
    add_bits(make_case((23, 6_000_000 // 46 // length, length), activation="relu", residual=True))
add_bits(make_case((64, 680, 197), "bfloat16", activation="relu"))
print(found.hexdigest())
"""


def test_how_memory_is_read_and_written_changes_no_bit() -> None:
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda tuning: run_under("", READ_AND_WRITTEN, tuning), ("intel", "zen4", "other")))
    assert [run.returncode for run in runs] == [0, 0, 0], "".join(run.stderr for run in runs)
    assert len({run.stdout for run in runs}) == 1
    assert len(runs[0].stdout) == 65


@pytest.mark.parametrize("isa", ["", "mmx"])
def test_a_processor_that_is_unknown_is_named(isa: str) -> None:
    result = run_under(isa, NAME_THE_ERROR, "mos")
    assert result.returncode == 0, result.stderr
    assert "FLATWATER_TUNING='mos'" in result.stdout
    assert ("FLATWATER_ISA='mmx'" in result.stdout) == bool(isa)
