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
    """The pool beside a list of its idle blocks, the one idle for longest first."""

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
        self.held: list[np.ndarray] = []
        self.hits = self.misses = 0

    def shrink(self) -> None:
        allowed = self.peak if self.limit is None else self.limit
        while sum(size for _, size in self.idle) > allowed:
            self.idle.pop(0)

    @rule(target=arrays, size=st.sampled_from([0, 8, 64, 72, 4096, 5000, 100_000, MIB, MIB + 8, 2 * MIB]))
    def take(self, size: int) -> int:
        size, taken = size // 8 * 8, block_size(size // 8 * 8)
        array = take(size)
        address = array.__array_interface__["data"][0]
        same = [block for block in self.idle if block[1] == taken]
        if same:
            assert address == same[-1][0]
            self.idle.remove(same[-1])
            self.hits += 1
        else:
            self.misses += 1
        self.in_use += taken
        self.peak = max(self.peak, self.in_use)
        self.held.append(array)
        return len(self.held) - 1

    @rule(which=consumes(arrays))
    def release(self, which: int) -> None:
        array = self.held[which]
        taken, address = block_size(array.nbytes), array.__array_interface__["data"][0]
        self.held[which] = np.empty(0)
        del array
        self.idle.append((address, taken))
        self.in_use -= taken
        self.shrink()

    @rule(limit=st.sampled_from([None, 0, 64, 10_000, MIB, 3 * MIB]))
    def set_limit(self, limit: int | None) -> None:
        pool.set_limit(limit)
        self.limit = limit
        self.shrink()

    @rule()
    def trim(self) -> None:
        assert pool.trim() == sum(size for _, size in self.idle)
        self.idle.clear()
        self.peak = self.in_use

    @rule()
    def ask_for_too_much(self) -> None:
        with pytest.raises(MemoryError):
            pool.empty_capsule((1 << 60,), "float64")

    @invariant()
    def numbers_agree(self) -> None:
        idle = sum(size for _, size in self.idle)
        limit = self.peak if self.limit is None else self.limit
        hits, misses = self.before.hits + self.hits, self.before.misses + self.misses
        assert pool.statistics() == (self.in_use, idle, self.peak, limit, hits, misses)

    def teardown(self) -> None:
        self.held.clear()
        pool.set_limit(None)


PoolMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
test_any_sequence_of_calls = PoolMachine.TestCase
