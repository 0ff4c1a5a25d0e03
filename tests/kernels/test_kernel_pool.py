"""The pool: what it keeps, for whom, how much of it, and who may give a block back.

Its numbers are those of the whole process, in which other tests have used it too: so differences are looked at,
and every test begins with nothing idle.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_harness import DTYPES
from pool_harness import DLPACK_TYPES, MIB, Lent, block_size, look_into, run, take

from flatwater.errors import InputError
from flatwater.kernels import pool

KIB = 1 << 10


@pytest.fixture(autouse=True)
def _nothing_idle() -> Iterator[None]:
    gc.collect()
    pool.trim()
    yield
    pool.set_limit(None)
    pool.trim()


def change(act: Callable[[], Any]) -> dict[str, int]:
    """By how much each of the pool's numbers differs after ``act()``, where it does."""
    before = pool.statistics()
    act()
    after = pool.statistics()._asdict()
    return {name: after[name] - old for name, old in before._asdict().items() if after[name] != old}


# --- Tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 5), (2, 3, 5), (7, 1, 1, 13)], ids=str)
def test_a_capsule_is_a_dense_tensor(shape: tuple[int, ...], dtype: str) -> None:
    capsule = pool.empty_capsule(shape, dtype)
    tensor = look_into(capsule)
    assert (tensor.code, tensor.bits) == DLPACK_TYPES[dtype]
    assert (tensor.lanes, tensor.device_type, tensor.device_id, tensor.byte_offset) == (1, 1, 0, 0)
    assert tuple(tensor.shape[: tensor.ndim]) == shape
    assert tensor.strides[: tensor.ndim] == [prod(shape[i + 1 :]) for i in range(len(shape))]
    assert tensor.data % 64 == 0


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])  # NumPy has no bfloat16
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (2, 3, 5), (70, 90, 110)], ids=str)
def test_numpy_adopts_and_fills_it(shape: tuple[int, ...], dtype: str) -> None:
    array = np.from_dlpack(Lent(pool.empty_capsule(shape, dtype)))
    assert (array.shape, array.dtype) == (shape, dtype)
    assert array.flags.c_contiguous
    ctypes.memset(array.ctypes.data, 0x3C, array.nbytes)  # NumPy holds what it adopts to be read-only
    assert set(array.tobytes()) <= {0x3C}


@pytest.mark.parametrize("size", [8, 4 * KIB, 127 * KIB, 128 * KIB, MIB, 2 * MIB - 8, 2 * MIB, 5 * MIB, 33 * MIB])
def test_blocks_lie_on_cache_lines_and_large_ones_on_huge_pages(size: int) -> None:
    for array in [take(size) for _ in range(3)]:
        assert array.ctypes.data % (2 * MIB if size >= 2 * MIB else 64) == 0


@pytest.mark.parametrize("size", [0, 8, 64, 72, 120, 1000, 4096, 4104, 100_000, MIB, MIB + 8, 3_000_000])
def test_at_most_an_eighth_or_63_bytes_more_is_taken(size: int) -> None:
    held: list[np.ndarray] = []
    taken = change(lambda: held.append(take(size)))["in_use"]
    assert taken == block_size(size)
    assert size <= taken <= max(size + 63, size * 9 // 8, 64)


# --- Reuse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 10 * KIB, MIB, 5 * MIB])
def test_what_was_freed_is_taken_again(size: int) -> None:
    array = take(size)
    address = array.ctypes.data
    del array
    held: list[np.ndarray] = []
    assert change(lambda: held.append(take(size))) == {
        "in_use": block_size(size), "idle": -block_size(size), "limit": -block_size(size), "hits": 1,
    }  # fmt: skip
    assert held[0].ctypes.data == address


def test_the_one_freed_last_comes_first() -> None:
    """It may still be in a cache."""
    arrays = [take(MIB) for _ in range(3)]
    addresses = [array.ctypes.data for array in arrays]
    while arrays:
        arrays.pop(0)
    again = [take(MIB).ctypes.data, *(array.ctypes.data for array in [take(MIB) for _ in range(3)])]
    assert again == [addresses[2], addresses[2], addresses[1], addresses[0]]


def test_a_larger_size_is_another_block() -> None:
    take(MIB)
    held: list[np.ndarray] = []
    assert change(lambda: held.append(take(2 * MIB))) == {"in_use": 2 * MIB, "peak": MIB, "misses": 1}


def test_a_block_of_up_to_twice_the_size_will_do_and_the_smallest_comes_first() -> None:
    addresses = {}
    for size in (8, 5, 3, 4):  # all at once, so that all may lie idle
        addresses[size] = take(size * MIB)
    held = {size: array.ctypes.data for size, array in addresses.items()}
    addresses.clear()
    kept = [take(4 * MIB), take(4 * MIB), take(2 * MIB)]
    assert [array.ctypes.data for array in kept] == [held[4], held[5], held[3]]
    assert change(lambda: kept.append(take(4 * MIB - 8))) == {
        "in_use": 4 * MIB, "idle": -4 * MIB, "limit": -4 * MIB, "hits": 1,
    }  # fmt: skip
    assert kept[-1].ctypes.data == held[8]
    assert change(lambda: kept.append(take(2 * MIB)))["misses"] == 1


# --- How much stays ----------------------------------------------------------------------------------------


def test_at_first_twice_the_peak_may_be_held() -> None:
    """A step finds everything again that it freed, also what it did not need at the same time."""
    before = pool.statistics()

    def step() -> None:
        arrays = [take(MIB) for _ in range(4)]
        arrays.clear()
        arrays.append(take(4 * MIB))

    step()
    assert pool.statistics().idle - before.idle == 8 * MIB
    assert pool.statistics()[2:4] == (before.in_use + 4 * MIB, before.in_use + 8 * MIB)
    assert change(step) == {"hits": 5}
    # None fits this one, and of the four of 1 MiB, which have been idle for longest, two go for it.
    assert change(lambda: take(3 * MIB // 2)) == {"idle": -MIB // 2, "misses": 1}


def test_changing_widths_find_what_other_widths_have_freed() -> None:
    """As lines of text: a chain of eight layers, whose tensors live until the way back, at one of 33 widths."""
    widths = np.random.default_rng(0).integers(8, 41, 200)

    def step(width: int) -> None:
        layers = [take(int(width) * layer * 8 * KIB) for layer in (8, 8, 4, 4, 2, 2, 1, 1)]
        while layers:
            gradient = take(layers[-1].nbytes)
            layers.pop()
            del gradient

    for width in widths[:50]:
        step(width)
    changed = change(lambda: [step(width) for width in widths[50:]])
    assert changed["misses"] < 0.05 * changed["hits"]
    assert pool.statistics().in_use + pool.statistics().idle <= 2 * pool.statistics().peak


def test_beyond_the_limit_the_block_idle_for_longest_goes() -> None:
    pool.set_limit(3 * MIB)
    arrays = [take(MIB) for _ in range(3)] + [take(2 * MIB)]
    for _ in range(3):
        arrays.pop(0)
    assert pool.statistics().idle == 3 * MIB
    arrays.clear()  # 2 MiB come, the first two of the three blocks of 1 MiB go
    assert pool.statistics().idle == 3 * MIB
    held: list[np.ndarray] = []
    assert change(lambda: held.extend([take(2 * MIB), take(MIB)]))["hits"] == 2
    assert change(lambda: held.append(take(MIB)))["misses"] == 1


def test_a_block_larger_than_the_limit_does_not_stay() -> None:
    pool.set_limit(MIB)
    assert change(lambda: take(2 * MIB))["misses"] == 1
    assert pool.statistics().idle == 0


def test_a_new_limit_counts_at_once_and_none_is_the_peak_again() -> None:
    arrays = [take(MIB) for _ in range(4)]
    arrays.clear()
    pool.set_limit(2 * MIB)
    assert pool.statistics().idle == pool.statistics().limit == 2 * MIB
    pool.set_limit(0)
    assert pool.statistics().idle == 0
    assert change(lambda: take(MIB)) == {"misses": 1}
    pool.set_limit(None)
    assert pool.statistics().limit == 2 * pool.statistics().peak - pool.statistics().in_use


def test_trim_gives_back_what_is_idle_and_forgets_the_peak() -> None:
    held = take(MIB)
    for size in (8, 100 * KIB, MIB, 3 * MIB):
        take(size)
    statistics = pool.statistics()
    assert pool.trim() == statistics.idle
    assert pool.statistics()._asdict() == statistics._asdict() | {
        "idle": 0, "peak": statistics.in_use, "limit": statistics.in_use,
    }  # fmt: skip
    assert pool.trim() == 0
    held[...].sum()  # what is in use was not touched


RESIDENT = """
import ctypes
from pathlib import Path
from flatwater.kernels import pool
from pool_harness import MIB, take

def resident():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024

def fill():
    array = take(256 * MIB)
    ctypes.memset(array.ctypes.data, 1, array.nbytes)
    print(resident() - before)

before = resident()
fill()
print(resident() - before)
pool.trim()
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_goes_back_to_the_system() -> None:
    filled, idle, trimmed = map(int, run(RESIDENT).split())
    # A few MiB each way: ctypes, NumPy and the interpreter take some of their own meanwhile.
    assert abs(filled - 256 * MIB) < 8 * MIB
    assert abs(idle - 256 * MIB) < 8 * MIB
    assert abs(trimmed) < 8 * MIB


# --- Misuse --------------------------------------------------------------------------------------------------


def test_negative_dimensions_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(2, -3\)"):
        pool.empty_capsule((2, -3), "float32")


@pytest.mark.parametrize("dtype", ["int64", "float", "complex64", ""])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(InputError, match=repr(dtype)):
        pool.empty_capsule((2,), dtype)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(InputError, match="-1"):
        pool.set_limit(-1)


@pytest.mark.parametrize(
    "shape",
    [(1 << 62, 1 << 62), (1 << 61,), (1 << 60,), (1 << 31, 1 << 31), (1 << 50,)],
    ids=["elements overflow", "bytes overflow", "too many", "product", "more than there is"],
)
def test_what_nobody_has_is_a_memory_error(shape: tuple[int, ...]) -> None:
    take(MIB)
    before = pool.statistics()
    with pytest.raises(MemoryError):
        pool.empty_capsule(shape, "float64")
    after = pool.statistics()
    assert (after.in_use, after.hits) == (before.in_use, before.hits)
    assert after.idle <= before.idle  # the pool may have been trimmed in the search for memory


# --- Who gives a block back -------------------------------------------------------------------------------


def test_a_capsule_that_nobody_consumed_gives_its_block_back() -> None:
    assert change(lambda: pool.empty_capsule((MIB,), "float32")) == {
        "idle": 4 * MIB, "peak": 4 * MIB, "limit": 8 * MIB, "misses": 1,
    }  # fmt: skip


def test_a_view_keeps_the_block() -> None:
    view = take(MIB)[5:9]
    assert change(gc.collect) == {}
    assert change(lambda: take(MIB))["misses"] == 1
    address = view.ctypes.data
    del view
    assert take(MIB).ctypes.data == address - 5 * 8


def test_another_thread_may_give_a_block_back() -> None:
    held = [take(MIB)]
    thread = threading.Thread(target=held.clear)
    assert change(lambda: (thread.start(), thread.join())) == {"in_use": -MIB, "idle": MIB, "limit": MIB}
    assert change(lambda: take(MIB))["hits"] == 1


def test_threads_take_and_give_back_at_the_same_time() -> None:
    """Every block has one owner at a time: what a thread wrote into its own is there until it lets go."""

    def work(mark: int) -> None:
        held: list[np.ndarray] = []
        for step in range(300):
            array = take(KIB * (1 + step % 7))
            ctypes.memset(array.ctypes.data, mark, array.nbytes)
            held.append(array)
            if step % 3:
                assert set(held.pop(0).tobytes()) == {mark}
            if step % 50 == 0:
                pool.trim()

    before = pool.statistics()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(1, 9)))
    after = pool.statistics()
    assert after.in_use == before.in_use
    assert after.hits + after.misses - before.hits - before.misses == 8 * 300


# --- fork --------------------------------------------------------------------------------------------------


FORK = """
import ctypes, os, signal, threading
from flatwater.kernels import pool
from pool_harness import MIB, take

def churn(stop):
    while not stop.is_set():
        take(MIB)

stop = threading.Event()
threads = [threading.Thread(target=churn, args=(stop,)) for _ in range(4)]
for thread in threads:
    thread.start()
kept = take(MIB)
ctypes.memset(kept.ctypes.data, 7, kept.nbytes)
codes = []
for _ in range(40):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that finds the pool locked would wait for ever
        for _ in range(5):
            mine = take(MIB)
            ctypes.memset(mine.ctypes.data, 9, mine.nbytes)
        del mine
        pool.trim()
        os._exit(0 if set(kept.tobytes()) == {7} else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop.set()
for thread in threads:
    thread.join()
print(set(codes), set(kept.tobytes()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_gets_the_pool_whole_whatever_other_threads_were_doing() -> None:
    assert run(FORK).strip() == "{0} {7}"


def test_a_tensor_may_outlive_everything() -> None:
    """At exit the interpreter drops modules and globals in any order."""
    assert run(
        "import atexit, pool_harness\nheld = pool_harness.take(1 << 20)\natexit.register(lambda: print(held[0] * 0))"
    )
