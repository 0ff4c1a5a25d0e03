"""Batch norm kernels against the oracle: values, gradients, the two halves, and what may be left out."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import (
    DTYPES,
    EPSILON,
    SHAPES,
    Moments,
    Sums,
    assert_guards,
    backward,
    check_backward,
    check_forward,
    check_rounding,
    forward,
    like,
    make_case,
    oracle_forward,
    place,
    same_bits,
)

from flatwater import kernels, reference
from flatwater.spec import ACTIVATIONS, Activation

LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["NCL", "NLC"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)

# Channels so short that a task takes several, the last task fewer: in one run of samples, in three, in two blocks; and
# channels too long for their outputs to be fetched in time, though the tensor is not written past the caches.
TASKS = ((2, 133, 49), (20, 133, 49), (24, 70, 196), (40, 8, 1000))

cases = st.builds(
    make_case,
    st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 70)),
    st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    residual=st.booleans(),
    affine=st.booleans(),
    offset=st.integers(0, 17),
    seed=st.integers(0, 2**32 - 1),
)


@EVERY_ACTIVATION
@LAYOUTS
@EVERY_DTYPE
def test_forward_and_backward_are_the_oracles(dtype: str, channels_last: bool, activation: Activation) -> None:
    for seed, (shape, residual) in enumerate(product(SHAPES, [False, True])):
        case = make_case(shape, dtype, channels_last=channels_last, activation=activation, residual=residual, seed=seed)
        check_forward(case)
        check_backward(case)
        check_backward(case, frozen=True)


@given(cases, st.integers(0, 17))
@settings(max_examples=150, deadline=None)
def test_any_shape_at_any_address(case, offset) -> None:
    check_forward(case, offset=offset)
    check_backward(case, offset=offset)
    check_backward(case, frozen=True, offset=offset)


@LAYOUTS
def test_tensors_beyond_every_cache(channels_last: bool) -> None:
    """What is as large as this is written past the caches, in code of its own; here off every alignment."""
    case = make_case((3, 5, 299_993), channels_last=channels_last, activation="relu", residual=True, offset=3, seed=1)
    check_forward(case, offset=5)
    check_backward(case, offset=7)


@pytest.mark.parametrize(("dtype", "samples"), [("float64", 32), ("float32", 64), ("bfloat16", 128)])
def test_planes_that_begin_and_end_within_cache_lines_beyond_every_cache(dtype: str, samples: int) -> None:
    """The lines that they share are written otherwise than those between: 197 is prime, every phase comes up."""
    case = make_case((samples, 337, 197), dtype, activation="relu", residual=True)
    check_forward(case, offset=1)
    check_backward(case, offset=3)


@pytest.mark.parametrize("inner", [197, 2048])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_that_lie_differently_in_cache_lines_beyond_every_cache(dtype: str, inner: int) -> None:
    """Where the lines of one are whole, those of the other are not."""
    samples = -(-(2**24) // (337 * inner * (4 if dtype == "float32" else 2)))
    case = make_case((samples, 337, inner), dtype, activation="relu", residual=True)
    moments = forward(case)[1]
    expected = backward(case, moments)
    for offset, apart in ((0, 5), (3, 1), (7, 9)):
        found = backward(case, moments, offset=offset, apart=apart)
        assert same_bits(found.dx, expected.dx)
        assert same_bits(found.dresidual, expected.dresidual)


def test_bfloat16_rounds_to_nearest() -> None:
    check_rounding()


@LAYOUTS
@pytest.mark.parametrize("name", ["mean", "inv_std", "weight", "bias"])
@EVERY_DTYPE
def test_no_nan_is_rounded_to_a_number(dtype: str, name: str, channels_last: bool) -> None:
    """A coefficient's own may have every bit set, to which rounding must not add."""
    case = make_case((3, 64, 40), dtype, channels_last=channels_last)
    _, moments = forward(case)
    given = {**moments.normalizing(), "weight": case.weight, "bias": case.bias}
    bits = {4: np.uint32, 8: np.uint64}[given[name].itemsize]
    given[name] = np.full(given[name].shape, np.iinfo(bits).max, bits).view(given[name].dtype)
    case = replace(case, weight=given["weight"], bias=given["bias"])
    moments = replace(moments, mean=given["mean"], inv_std=given["inv_std"])
    y = like(case.x)
    kernels.batch_normalize(case.buffer(case.x), case.buffer(y), **moments.normalizing(), **case.given())
    assert np.isnan(y).all()
    if name != "bias":  # of which dx knows nothing where there is no activation
        assert np.isnan(backward(case, moments).dx).all()


@pytest.mark.parametrize("shape", TASKS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_channels_as_tasks(dtype: str, shape: tuple[int, int, int]) -> None:
    case = make_case(shape, dtype, activation="hardswish", residual=True)
    check_forward(case)
    check_backward(case)


def test_channels_of_a_task_know_nothing_of_each_other() -> None:
    case = make_case((20, 133, 49), "float32")
    _, ordinary = forward(case)
    odd = {40: lambda x: x * 1e-25, 41: np.zeros_like, 42: lambda x: x * 1e25, 43: lambda x: x * np.nan}
    for channel, change in odd.items():
        case.x[:, channel] = change(case.x[:, channel])
    _, found = forward(case)
    mean, m2 = like(found.mean), like(found.m2)
    kernels.batch_statistics(case.buffer(case.x), mean, m2)  # one channel after the other
    assert same_bits(mean, found.mean)
    assert same_bits(m2, found.m2)
    others = np.setdiff1d(np.arange(133), list(odd))
    assert same_bits(found.m2[others], ordinary.m2[others])
    exact = case.x[:, [40, 42]].astype(np.float64).var((0, 2)) * 20 * 49
    # A deviation is rounded once, in float32; squares and sums are float64.
    np.testing.assert_allclose(found.m2[[40, 42]], exact, rtol=2.0**-24)
    assert found.m2[41] == 0
    assert np.isnan(found.m2[43])


@EVERY_DTYPE
@LAYOUTS
def test_two_halves_make_a_whole_bit_for_bit(channels_last: bool, dtype: str) -> None:
    for shape, residual in product((*SHAPES, *TASKS), [False, True]):
        case = make_case(shape, dtype, channels_last=channels_last, activation="relu6", residual=residual)
        whole, moments = forward(case)
        mean, m2 = like(moments.mean), like(moments.m2)
        count = kernels.batch_statistics(case.buffer(case.x), mean, m2)
        assert count == shape[0] * shape[2]
        assert same_bits(mean, moments.mean)
        assert same_bits(m2, moments.m2)

        y = like(case.x)
        kernels.batch_normalize(case.buffer(case.x), case.buffer(y), **moments.normalizing(), **case.given())
        assert same_bits(y, whole)

        expected = backward(case, moments)
        sums = Sums.empty(case.channels)
        given_ = moments.normalizing() | case.given() | sums.given()
        kernels.batch_gradient_sums(case.buffer(case.dy), case.buffer(case.x), **given_)
        assert same_bits(sums.dz, expected.sums.dz)
        assert same_bits(sums.dz_xhat, expected.sums.dz_xhat)

        dx, dresidual = like(case.x), like(case.x)
        outputs = case.buffer(dx), case.buffer(dresidual) if residual else None
        kernels.batch_input_gradient(case.buffer(case.dy), case.buffer(case.x), *outputs, **given_, count=count)
        assert_guards(y, dx, dresidual, mean, m2, sums.dz, sums.dz_xhat)
        assert same_bits(dx, expected.dx)
        assert not residual or same_bits(dresidual, expected.dresidual)


def test_statistics_of_parts_are_what_a_collective_combines() -> None:
    """SyncBatchNorm: halves on two processes, statistics and sums exchanged between, equal one process."""
    whole = make_case((6, 7, 41), "float64", activation="swish", residual=True)
    expected_y, moments = forward(whole)
    expected = backward(whole, moments)

    parts = [
        replace(whole, **{name: np.ascontiguousarray(getattr(whole, name)[rows]) for name in ("x", "dy", "residual")})
        for rows in (slice(0, 2), slice(2, 6))
    ]
    local = [forward(part)[1] for part in parts]
    counts = np.array([part.x.shape[0] * 41 for part in parts])[:, None]
    means, m2s = np.stack([each.mean for each in local]), np.stack([each.m2 for each in local])
    mean = (counts * means).sum(0) / counts.sum()
    m2 = (m2s + counts * (means - mean) ** 2).sum(0)
    together = Moments(mean, m2, 1 / np.sqrt(m2 / counts.sum() + EPSILON))

    # 1e-12: float64 sums in another order.
    np.testing.assert_allclose(together.m2, moments.m2, rtol=1e-12)
    total, part_sums = Sums(np.zeros(7), np.zeros(7)), []
    for part in parts:
        sums = Sums.empty(7)
        given_ = together.normalizing() | part.given() | sums.given()
        kernels.batch_gradient_sums(part.buffer(part.dy), part.buffer(part.x), **given_)
        part_sums.append(sums)
    total = Sums(sum(each.dz for each in part_sums), sum(each.dz_xhat for each in part_sums))

    for part, rows in zip(parts, (slice(0, 2), slice(2, 6)), strict=True):
        y, dx = like(part.x), like(part.x)
        kernels.batch_normalize(part.buffer(part.x), part.buffer(y), **together.normalizing(), **part.given())
        given_ = together.normalizing() | part.given() | total.given()
        kernels.batch_input_gradient(
            part.buffer(part.dy), part.buffer(part.x), part.buffer(dx), None, **given_, count=int(counts.sum())
        )
        np.testing.assert_allclose(y, expected_y[rows], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(dx, expected.dx[rows], rtol=1e-12, atol=1e-12)


@LAYOUTS
def test_a_gradient_that_is_not_asked_for_changes_no_other(channels_last: bool) -> None:
    for shape in SHAPES:
        case = make_case(shape, channels_last=channels_last, activation="hardswish", residual=True)
        moments = forward(case)[1]
        everything = backward(case, moments)
        for want_dx, want_dresidual in [(True, False), (False, True), (False, False)]:
            some = backward(case, moments, want_dx=want_dx, want_dresidual=want_dresidual)
            assert same_bits(some.sums.dz, everything.sums.dz)
            assert same_bits(some.sums.dz_xhat, everything.sums.dz_xhat)
            assert not want_dx or same_bits(some.dx, everything.dx)
            assert not want_dresidual or same_bits(some.dresidual, everything.dresidual)


@LAYOUTS
@EVERY_DTYPE
def test_no_parameters_are_ones_and_zeros(dtype: str, channels_last: bool) -> None:
    plain = make_case((3, 21, 50), dtype, channels_last=channels_last, activation="swish", affine=False)
    parameters = np.float64 if dtype == "float64" else np.float32
    ones, zeros = np.ones(21, parameters), np.zeros(21, parameters)
    for spelled_out in (
        replace(plain, weight=ones, bias=zeros),
        replace(plain, weight=ones),
        replace(plain, bias=zeros),
    ):
        (y, moments), (expected, _) = forward(spelled_out), forward(plain)
        assert same_bits(y, expected)
        one, other = backward(spelled_out, moments), backward(plain, moments)
        assert same_bits(one.dx, other.dx)
        assert same_bits(one.sums.dz_xhat, other.sums.dz_xhat)


@LAYOUTS
@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)], ids=str)
def test_no_elements_are_no_work(shape: tuple[int, int, int], dtype: str, channels_last: bool) -> None:
    case = make_case(shape, dtype, channels_last=channels_last, residual=True)
    y, moments = like(case.x), Moments.empty(case.channels)
    given_ = case.given() | moments.all() | {"epsilon": EPSILON}
    count = kernels.batch_norm_forward(case.buffer(case.x), case.buffer(y), **given_)
    assert count == kernels.batch_statistics(case.buffer(case.x), moments.mean, moments.m2) == 0
    assert moments.mean.tolist() == moments.m2.tolist() == [0.0] * case.channels
    assert same_bits(moments.inv_std, Moments.of(oracle_forward(case).statistics).inv_std)
    sums = backward(case, Moments(*(np.zeros(case.channels) for _ in range(3)))).sums
    assert sums.dz.tolist() == sums.dz_xhat.tolist() == [0.0] * case.channels


@LAYOUTS
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 12345.678, 3e-39])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_constant_channel_is_normalized_to_its_bias(shape, value: float, channels_last: bool) -> None:
    case = make_case(shape, channels_last=channels_last, seed=3)
    constant = replace(case, x=place(np.full(case.x.shape, value), np.float32))
    y, moments = forward(constant)
    bias = case.bias if channels_last else case.bias[:, None]
    # √ε = 3e-3 divides what rounding leaves of x - mean, which is at most an ulp of x in 100.
    np.testing.assert_allclose(y, np.broadcast_to(bias, y.shape), rtol=1e-6, atol=1e-7 + abs(value) * 4e-7)
    np.testing.assert_allclose(moments.mean, np.float64(np.float32(value)), rtol=1e-9)
    assert (moments.m2 >= 0).all()
    check_backward(constant)


@LAYOUTS
@EVERY_DTYPE
def test_denormal_inputs(dtype: str, channels_last: bool) -> None:
    case = make_case((4, 9, 60), dtype, channels_last=channels_last)
    tiny = 20 * float(np.finfo(np.float32).smallest_subnormal) if dtype == "bfloat16" else None
    scale = tiny or 20 * float(np.finfo(dtype).smallest_subnormal)
    x = place(np.random.default_rng(0).integers(-9, 9, case.x.shape) * scale, case.x.dtype)
    denormal = replace(case, x=x, bias=None, weight=None)
    y, _ = forward(denormal)
    expected = oracle_forward(denormal).y
    # Nothing is known to less than a unit of the smallest number, the mean is rounded to it a few times where the
    # samples are put together, and 1 / √ε magnifies that 316 times.
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=0.01, atol=4 * 316 * scale / 20)


@LAYOUTS
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] > 1], ids=str)
def test_poison_stays_in_its_channel_and_fills_it(shape, poison: float, channels_last: bool) -> None:
    clean = make_case(shape, channels_last=channels_last, activation="relu", seed=5)
    channel, x = shape[1] // 2, clean.x.copy()
    x[(0, 0, channel) if channels_last else (0, channel, 0)] = poison
    poisoned = replace(clean, x=x)

    (y, moments), (clean_y, clean_moments) = forward(poisoned), forward(clean)
    dx, clean_dx = backward(poisoned, moments).dx, backward(clean, clean_moments).dx
    for dirty, untouched in [(y, clean_y), (dx, clean_dx)]:
        first, second = (np.moveaxis(array, clean.axis, 0) for array in (dirty, untouched))
        others = np.arange(shape[1]) != channel
        assert same_bits(first[others], second[others])
        assert np.isnan(first[channel]).all()
    assert np.isnan(moments.inv_std[channel])


@LAYOUTS
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_frozen_poison_in_dy_stays_in_its_element(shape, poison: float, channels_last: bool) -> None:
    """No sum comes into dx = γ·inv_std·dz."""
    clean = make_case(shape, channels_last=channels_last, seed=5)
    moments, dy = forward(clean)[1], clean.dy.copy()
    dy.flat[-1] = poison
    dx, clean_dx = (backward(case, moments, frozen=True).dx for case in (replace(clean, dy=dy), clean))
    assert same_bits(dx.flat[:-1], clean_dx.flat[:-1])
    assert not np.isfinite(dx.flat[-1])


@EVERY_DTYPE
@LAYOUTS
@pytest.mark.parametrize("inner", [3, 512])
@EVERY_ACTIVATION
def test_slopes_exactly_at_the_kinks(activation: Activation, inner: int, channels_last: bool, dtype: str) -> None:
    """With constant statistics of 0 and 1, z is x, and x sits on the kinks."""
    case = make_case((5, 6, inner), dtype, channels_last=channels_last, activation=activation, affine=False)
    x = np.resize(np.array([-3.0, 0.0, 3.0, 6.0, -0.0, 1.0, -7.0]), case.x.shape)
    case = replace(case, x=place(x, case.x.dtype))
    actual = backward(case, Moments(np.zeros(6), np.zeros(6), np.ones(6)), frozen=True, want_dresidual=True)
    expected = reference.activation_gradient(activation, x) * case.dy.astype(np.float64)
    # One rounding to the dtype of a product computed in float32 (float64 for float64).
    rtol = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 2.0**-8, "float16": 2.0**-10}[dtype]
    np.testing.assert_allclose(actual.dx.astype(np.float64), expected.astype(np.float64), rtol=rtol, atol=1e-7)
    assert same_bits(actual.dx, actual.dresidual)
