"""Any sequence of calls of the pool, against lists."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from pool_harness import MIB, block_size, take

from flatwater.kernels import pool


class PoolMachine(RuleBasedStateMachine):
    """The pool beside lists: of its idle blocks, the one idle for longest first, and of what is lent."""

    arrays = Bundle("arrays")

    @initialize()
    def empty(self) -> None:
        gc.collect()
        pool.set_limit(None)
        pool.trim()
        self.before = pool.statistics()
        self.in_use = self.peak = self.before.in_use
        self.limit: int | None = None
        self.idle: list[tuple[int, int]] = []  # (address, size)
        self.lent: list[tuple[np.ndarray, int]] = []  # with the size of its block
        self.held = self.before.in_use + self.before.idle
        self.hits = self.misses = 0

    def shrink(self, used: int) -> None:
        allowed = 2 * max(self.peak, used) if self.limit is None else used + self.limit
        while self.idle and self.held > allowed:
            self.held -= self.idle.pop(0)[1]

    @rule(target=arrays, size=st.sampled_from([0, 8, 64, 72, 4096, 5000, 100_000, MIB, MIB + 8, 2 * MIB]))
    def take(self, size: int) -> int:
        size, taken = size // 8 * 8, block_size(size // 8 * 8)
        array = take(size)
        address = array.__array_interface__["data"][0]
        fitting = [block for block in self.idle if taken <= block[1] <= 2 * taken]
        if fitting:
            smallest = min(size for _, size in fitting)
            block = [block for block in fitting if block[1] == smallest][-1]
            assert address == block[0]
            self.idle.remove(block)
            self.hits += 1
        else:
            block = address, taken
            self.held += taken
            self.shrink(self.in_use + taken)
            self.misses += 1
        self.in_use += taken
        self.peak = max(self.peak, self.in_use)
        self.lent.append((array, block[1]))
        return len(self.lent) - 1

    @rule(which=consumes(arrays))
    def release(self, which: int) -> None:
        array, size = self.lent[which]
        address = array.__array_interface__["data"][0]
        self.in_use -= block_size(array.nbytes)
        self.lent[which] = np.empty(0), 0
        del array
        self.idle.append((address, size))
        self.shrink(self.in_use)

    @rule(limit=st.sampled_from([None, 0, 64, 10_000, MIB, 3 * MIB]))
    def set_limit(self, limit: int | None) -> None:
        pool.set_limit(limit)
        self.limit = limit
        self.shrink(self.in_use)

    @rule()
    def trim(self) -> None:
        idle = sum(size for _, size in self.idle)
        assert pool.trim() == idle
        self.held -= idle
        self.idle.clear()
        self.peak = self.in_use

    @rule()
    def ask_for_too_much(self) -> None:
        with pytest.raises(MemoryError):
            pool.empty_capsule((1 << 60,), "float64")

    @invariant()
    def numbers_agree(self) -> None:
        limit = 2 * self.peak - self.in_use if self.limit is None else self.limit
        hits, misses = self.before.hits + self.hits, self.before.misses + self.misses
        assert pool.statistics() == (self.in_use, self.held - self.in_use, self.peak, limit, hits, misses)

    def teardown(self) -> None:
        self.lent.clear()
        pool.set_limit(None)


PoolMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
test_any_sequence_of_calls = PoolMachine.TestCase
