"""Paddle's tensors in the pool: which lie there, that they come back, and that training in its steady state takes
nothing new from the system.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle
import pytest

import flatwater.paddle as fw
from flatwater.kernels import pool
from flatwater.paddle import memory
from flatwater.paddle.memory import pooled_from

MIB = 1 << 20

# With an activation of 1 MiB and more, above the size from which tensors lie in the pool by default.
SHAPE = (4, 16, 80, 80)
BYTES = 4 * 16 * 80 * 80 * 4


@pytest.fixture(autouse=True)
def _nothing_idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "_POOLED_FROM", pooled_from({}))  # whatever allocator settings the tests run under
    gc.collect()
    pool.trim()
    yield
    pool.trim()


@pytest.fixture
def net() -> paddle.nn.Sequential:
    """The norm between two convolutions, as in a model."""
    paddle.seed(0)
    conv = paddle.nn.Conv2D
    return paddle.nn.Sequential(conv(3, 16, 3, padding=1), fw.BatchNorm2D(16, act="relu"), conv(16, 4, 3, padding=1))


def train(net: paddle.nn.Sequential, steps: int) -> list[pool.PoolStatistics]:
    """Statistics of the pool after each step."""
    optimizer = paddle.optimizer.SGD(0.01, parameters=net.parameters())
    image = paddle.randn([SHAPE[0], 3, *SHAPE[2:]])
    after = []
    for _ in range(steps):
        net(image).square().mean().backward()
        optimizer.step()
        optimizer.clear_grad()
        after.append(pool.statistics())
    return after


def test_outputs_and_gradients_lie_in_the_pool() -> None:
    layer = fw.BatchNorm2D(16, act="relu")
    x, residual = paddle.randn(SHAPE), paddle.randn(SHAPE)
    x.stop_gradient = residual.stop_gradient = False
    before = pool.statistics()
    y = layer(x, residual)
    assert pool.statistics().in_use - before.in_use >= BYTES
    gradients = paddle.grad(y, [x, residual], paddle.ones_like(y))
    taken = pool.statistics().in_use - before.in_use
    assert 3 * BYTES <= taken <= 3 * BYTES * 9 / 8
    addresses = [tensor.data_ptr() for tensor in (y, *gradients)]
    assert all(address % 64 == 0 for address in addresses)

    # And nobody else's memory: the next ones of that size are these blocks.
    del y, gradients
    again = layer(x, residual)
    assert again.data_ptr() in addresses


def test_small_tensors_are_left_to_paddle() -> None:
    layer = fw.BatchNorm2D(16)
    before = pool.statistics()
    y = layer(paddle.randn([2, 16, 8, 8]))
    assert pool.statistics() == before
    assert y.shape == [2, 16, 8, 8]


def test_after_the_first_steps_everything_is_there(net: paddle.nn.Sequential) -> None:
    _, warm, *steady = train(net, 6)
    for step in steady:
        assert step.misses == warm.misses
        assert step.hits > warm.hits


def test_nothing_leaks(net: paddle.nn.Sequential) -> None:
    before = pool.statistics().in_use
    after = train(net, 50)
    assert {step.in_use for step in after} == {before}
    assert {step.idle for step in after[1:]} == {after[1].idle}


def test_evaluation_and_no_grad_give_everything_back(net: paddle.nn.Sequential) -> None:
    before = pool.statistics().in_use
    image = paddle.randn([SHAPE[0], 3, *SHAPE[2:]])
    with paddle.no_grad():
        net(image)
    net.eval()
    net(image)
    assert pool.statistics().in_use == before


def test_views_keep_the_block_alive() -> None:
    layer = fw.BatchNorm2D(16)
    y = layer(paddle.randn(SHAPE))
    expected = y.numpy().copy()
    held = pool.statistics()
    views = [y.detach(), y.reshape([SHAPE[0], -1]).detach(), y[1:3].detach()]
    del y
    gc.collect()
    for _ in range(3):  # these take other blocks
        layer(paddle.randn(SHAPE))
    assert pool.statistics().in_use == held.in_use
    assert (views[0].numpy() == expected).all()
    assert (views[1].numpy() == expected.reshape(SHAPE[0], -1)).all()
    assert (views[2].numpy() == expected[1:3]).all()
    views.clear()
    gc.collect()
    assert pool.statistics().in_use <= held.in_use - BYTES


def test_a_numpy_view_keeps_the_block_alive() -> None:
    y = fw.BatchNorm2D(16)(paddle.randn(SHAPE)).detach()
    expected = y.numpy().copy()
    held = pool.statistics().in_use
    array = np.from_dlpack(y)
    del y
    gc.collect()
    assert pool.statistics().in_use == held
    assert (array == expected).all()
    del array
    assert pool.statistics().in_use <= held - BYTES


@pytest.mark.parametrize(("kept", "expected"), [(0, 1 << 18), (1024, 1 << 18), (8 << 20, 8 << 20)])
def test_what_the_c_library_keeps_is_left_to_it(kept: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "kept_by_malloc", lambda _: kept)
    assert pooled_from({}) == expected


def test_other_threads_take_large_tensors_from_the_pool_whatever_the_c_library_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "_POOLED_FROM", 1 << 40)
    large, small = paddle.zeros([MIB]), paddle.zeros([16])
    taken = []

    def take() -> None:
        before = pool.statistics().in_use
        tensors = [memory.empty_like(small), memory.empty_like(large)]
        taken.append(pool.statistics().in_use - before)
        del tensors

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    take()
    assert taken[0] >= 4 * MIB
    assert taken[1] == 0


# --- What the system sees ----------------------------------------------------------------------------------

# The norm alone in the graph: Paddle's own operators would fill tensors of their own, which are not in the pool.
STEPS = """
import gc
import resource
from pathlib import Path

import paddle
import flatwater.paddle as fw
from flatwater.kernels import pool

class Loss(paddle.autograd.PyLayer):
    # A loss whose gradient is there already.
    @staticmethod
    def forward(ctx, y, dy):
        ctx.dy = dy
        return paddle.zeros([])

    @staticmethod
    def backward(ctx, _):
        return ctx.dy, None

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024

layer = fw.BatchNorm2D(64, act="relu")
x, dy = paddle.randn([8, 64, 56, 56]), paddle.randn([8, 64, 56, 56])
x.stop_gradient = False

def step():
    paddle.grad(Loss.apply(layer(x), dy), [x, layer.weight, layer.bias])

for _ in range(5):
    step()
before = faults()
for _ in range(20):
    step()
gc.collect()
print((faults() - before) / 20)
before = resident()
print(pool.trim(), before - resident())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_step_takes_no_page_faults_and_trim_gives_the_memory_back() -> None:
    """In the default environment, in which every large block of the C library's begins with a fault per page."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    result = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    faults, trimmed, returned = map(float, result.stdout.split())
    # One tensor of this size alone would be 1568 pages. A few are left to the interpreter's own objects.
    assert faults < 16
    assert trimmed >= 8 * 64 * 56 * 56 * 4
    assert abs(returned - trimmed) < MIB
