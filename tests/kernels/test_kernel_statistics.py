"""How right the statistics are when the mean dwarfs the deviation, beside the peers, and the running update."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import check_backward, check_forward, forward, like, make_case

from flatwater import kernels, reference

# 10^4 deviations: float32 holds such numbers to a thousandth of a deviation, E[x²] - E[x]² loses them all.
RATIO = 1e4
SHAPES = ((8, 3, 56 * 56), (32, 16, 49), (64, 37, 1), (2, 5, 11), (16, 4, 299))
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["NCL", "NLC"])


def largest_errors(mean: np.ndarray, variance: np.ndarray, exact: reference.Statistics) -> tuple[float, float]:
    """Of the mean in deviations, of the variance in itself."""
    mean_errors = np.abs(mean - exact.mean) / np.sqrt(exact.variance)
    return float(mean_errors.max()), float((np.abs(variance - exact.variance) / exact.variance).max())


def own(x: np.ndarray, channels_last: bool) -> tuple[np.ndarray, np.ndarray]:
    memory = np.ascontiguousarray(np.moveaxis(x, 1, -1)) if channels_last else x
    mean, m2 = like(np.empty(x.shape[1])), like(np.empty(x.shape[1]))
    count = kernels.batch_statistics(kernels.Buffer.from_numpy(memory, channels_last=channels_last), mean, m2)
    return mean, m2 / count


def numpys(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean((0, 2)).astype(np.float64), x.var((0, 2)).astype(np.float64)


def paddles(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What batch_norm writes into the running statistics when it keeps nothing of the old ones."""
    paddle = pytest.importorskip("paddle")
    running = [paddle.zeros([x.shape[1]]), paddle.ones([x.shape[1]])]
    paddle.nn.functional.batch_norm(paddle.to_tensor(x), *running, training=True, momentum=0.0)
    mean, variance = (value.numpy().astype(np.float64) for value in running)
    return mean, variance


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("peer", [numpys, paddles])
def test_no_peer_is_closer_to_the_truth(peer, shape: tuple[int, int, int], channels_last: bool) -> None:
    generator = np.random.default_rng(0)
    x = (RATIO + generator.standard_normal(shape)).astype(np.float32)
    exact = reference.batch_statistics(x)
    ours, theirs = largest_errors(*own(x, channels_last), exact), largest_errors(*peer(x), exact)
    # A peer may be lucky in the last bit of its own float32 result; we are then held to half an ulp of that.
    floor = 2.0**-24
    assert ours[0] <= max(theirs[0], RATIO * floor), "mean"
    assert ours[1] <= max(theirs[1], floor), "variance"


@LAYOUTS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_everything_built_on_them_is_right_too(shape, dtype: str, channels_last: bool) -> None:
    """Output and gradients, to the tolerance for ordinary data: x - mean must not be rounded at x's size."""
    case = make_case(shape, dtype, channels_last=channels_last, activation="swish", center=RATIO)
    if dtype == "float32":
        check_forward(case)
        check_backward(case)
        return
    # In float64 the oracle's mean is itself rounded, by 2^-53 · 10^4 deviations, which is all that can differ.
    y, _ = forward(case)
    np.testing.assert_allclose(y, reference.batch_norm(case.x, **case.oracle()).y, rtol=0, atol=2e-11)


@LAYOUTS
@pytest.mark.parametrize("share", [64, 16, 2])
@pytest.mark.parametrize("shape", [(8, 3, 56 * 56), (32, 16, 49), (16, 4, 299)], ids=str)
def test_a_beginning_far_from_the_rest(shape: tuple[int, int, int], share: int, channels_last: bool) -> None:
    """The pivot is taken from the first elements of a block; here they say nothing of the others."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    planes = np.moveaxis(x, 1, 0).reshape(shape[1], -1).copy()
    planes[:, : planes.shape[1] // share] += RATIO
    x = np.ascontiguousarray(np.moveaxis(planes.reshape(shape[1], shape[0], shape[2]), 0, 1))
    mean_error, variance_error = largest_errors(*own(x, channels_last), reference.batch_statistics(x))
    # Deviations from the pivot are up to 4 standard deviations larger than from the mean, their squares up to 16 times.
    assert mean_error <= 4 * 2.0**-24
    assert variance_error <= 16 * 2.0**-24


@LAYOUTS
@pytest.mark.parametrize("pattern", [(1, -1), (3, -3, 0, 0, 0), (1, 3)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 520, 4), (2, 3, 4999)], ids=str)
def test_deviations_whose_squares_float_does_not_have(shape, pattern: tuple[int, ...], channels_last: bool) -> None:
    """Below 1e-45 a square is 0 in float32, as those of a constant are, and the sum of these deviations may be too."""
    x = np.resize(np.float32(1e-23) * np.array(pattern, np.float32), shape)
    exact = reference.batch_statistics(x)
    mean_error, variance_error = largest_errors(*own(x, channels_last), exact)
    assert mean_error <= 1e-6
    assert variance_error <= 1e-6


@LAYOUTS
def test_groups_too(channels_last: bool) -> None:
    case = make_case((4, 8, 300), channels_last=channels_last, activation="swish", center=RATIO, groups=2)
    check_forward(case)
    check_backward(case)


finite = st.floats(-1e6, 1e6)


@given(finite, finite, st.floats(0, 1e6), st.integers(2, 1000), st.floats(0, 1), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_running_statistics_move_as_the_oracles(old, mean, variance, count, momentum, unbiased, double) -> None:
    dtype = np.float64 if double else np.float32
    running_mean, running_variance = np.full(3, old, dtype), np.full(3, abs(old), dtype)
    batch = reference.Statistics(np.full(3, mean), np.full(3, variance), count)
    expected = reference.update_running(running_mean, running_variance, batch, momentum=momentum, unbiased=unbiased)
    kernels.update_running(
        kernels.Vector.from_numpy(running_mean),
        kernels.Vector.from_numpy(running_variance),
        mean=batch.mean,
        m2=batch.variance * count,
        count=count,
        momentum=momentum,
        unbiased=unbiased,
    )
    # Computed in float64, and rounded once to what they are stored in; cancellation counts at the terms' size.
    size = np.finfo(dtype).eps / 2 * 1.01
    for actual, wanted in zip((running_mean, running_variance), expected, strict=True):
        np.testing.assert_allclose(
            actual, wanted, rtol=size, atol=1e-15 * (abs(old) + abs(mean) + 2 * variance) + 1e-45
        )


def test_no_batch_moves_nothing() -> None:
    running = [np.array([1.5], np.float32), np.array([2.5], np.float32)]
    vectors = [kernels.Vector.from_numpy(array) for array in running]
    kernels.update_running(*vectors, mean=np.zeros(1), m2=np.zeros(1), count=0, momentum=0.9, unbiased=False)
    assert [array.tolist() for array in running] == [[1.5], [2.5]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_store_casts_into_borrowed_memory(dtype) -> None:
    values, vector = np.array([1 / 3, -2.0, 1e-3]), np.zeros(3, dtype)
    kernels.store(values, kernels.Vector.from_numpy(vector))
    np.testing.assert_array_equal(vector, values.astype(dtype))
