"""Group and instance norm kernels against the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import (
    DTYPES,
    EPSILON,
    Case,
    Moments,
    backward,
    check_backward,
    check_forward,
    forward,
    like,
    make_case,
    same_bits,
)

from flatwater import kernels
from flatwater.spec import ACTIVATIONS, Activation

LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["NCL", "NLC"])

# Samples, channels, inner, groups: one group, a group per channel (instance norm), and between. Then enough samples for
# each to be a task, with rows in several chunks, and of several positions; more groups of short planes than are taken
# together, and fewer groups than threads could share, of planes that are several blocks.
SHAPES = (
    *((2, 6, 5, 3), (3, 17, 31, 1), (2, 12, 49, 12), (1, 200, 7, 8), (5, 4, 1, 2), (2, 6, 4999, 3), (3, 64, 64, 64)),
    *((9, 24, 200, 4), (9, 8, 130, 2), (40, 33, 49, 33), (40, 32, 20, 8), (1, 4, 9001, 2)),
)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_are_the_oracles(dtype: str, channels_last: bool, activation: Activation) -> None:
    for seed, (*shape, groups) in enumerate(SHAPES):
        case = make_case(
            tuple(shape),
            dtype,
            channels_last=channels_last,
            activation=activation,
            residual=seed % 2 == 0,
            groups=groups,
            seed=seed,
        )
        check_forward(case)
        check_backward(case)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups, size = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return make_case(
        (draw(st.integers(1, 4)), groups * size, draw(st.integers(1, 70))),
        draw(st.sampled_from(DTYPES)),
        channels_last=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        residual=draw(st.booleans()),
        affine=draw(st.booleans()),
        groups=groups,
        offset=draw(st.integers(0, 17)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@given(cases(), st.integers(0, 17))
@settings(max_examples=100, deadline=None)
def test_any_shape_at_any_address(case: Case, offset: int) -> None:
    check_forward(case, offset=offset)
    check_backward(case, offset=offset)


@pytest.mark.parametrize(("dtype", "inner"), [("float32", 17), ("float32", 131), ("bfloat16", 131)])
def test_planes_that_begin_and_end_within_cache_lines_beyond_every_cache(dtype: str, inner: int) -> None:
    samples = -(-(2**24) // (640 * inner * (4 if dtype == "float32" else 2)))
    case = make_case((samples, 640, inner), dtype, activation="relu", residual=True, groups=32)
    check_forward(case, offset=1)
    check_backward(case, offset=3)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_halves_make_a_whole_bit_for_bit(dtype: str, channels_last: bool) -> None:
    for *shape, groups in SHAPES:
        case = make_case(tuple(shape), dtype, channels_last=channels_last, activation="swish", groups=groups)
        whole, moments = forward(case)
        mean, m2 = like(moments.mean), like(moments.m2)
        kernels.group_statistics(case.buffer(case.x), groups, mean, m2)
        assert same_bits(mean, moments.mean)
        assert same_bits(m2, moments.m2)
        y = like(case.x)
        given_ = moments.normalizing() | case.given()
        kernels.group_normalize(case.buffer(case.x), case.buffer(y), groups=groups, **given_)
        assert same_bits(y, whole)


@LAYOUTS
def test_a_gradient_that_is_not_asked_for_changes_no_other(channels_last: bool) -> None:
    for *shape, groups in SHAPES:
        case = make_case(tuple(shape), channels_last=channels_last, activation="relu", residual=True, groups=groups)
        moments = forward(case)[1]
        everything = backward(case, moments)
        for want_dx, want_dresidual in [(True, False), (False, True), (False, False)]:
            some = backward(case, moments, want_dx=want_dx, want_dresidual=want_dresidual)
            assert same_bits(some.sums.dz, everything.sums.dz)
            assert same_bits(some.sums.dz_xhat, everything.sums.dz_xhat)
            assert not want_dx or same_bits(some.dx, everything.dx)
            assert not want_dresidual or same_bits(some.dresidual, everything.dresidual)


@LAYOUTS
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=str)
def test_no_elements_are_no_work(shape: tuple[int, int, int], channels_last: bool) -> None:
    case = make_case(shape, channels_last=channels_last, groups=2, activation="relu")
    y, moments = like(case.x), Moments.empty(case.sets)
    given_ = case.given() | moments.all() | {"epsilon": EPSILON, "groups": 2}
    kernels.group_norm_forward(case.buffer(case.x), case.buffer(y), **given_)
    sums = backward(case, Moments(*(np.zeros(case.sets) for _ in range(3)))).sums
    assert sums.dz.tolist() == sums.dz_xhat.tolist() == [0.0] * case.channels


@LAYOUTS
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_stays_in_its_sample_and_group(poison: float, channels_last: bool) -> None:
    for *shape, groups in SHAPES:
        if shape[0] * groups == 1:
            continue
        clean = make_case(tuple(shape), channels_last=channels_last, activation="relu6", groups=groups)
        x = clean.x.copy()
        x[0, 0, 0] = poison  # the first group of the first sample
        poisoned = replace(clean, x=x)
        (y, moments), (clean_y, clean_moments) = forward(poisoned), forward(clean)
        dx, clean_dx = backward(poisoned, moments).dx, backward(clean, clean_moments).dx
        for dirty, untouched in [(y, clean_y), (dx, clean_dx)]:
            by_set, clean_by_set = (
                np.moveaxis(array, clean.axis, 1).reshape(shape[0] * groups, -1) for array in (dirty, untouched)
            )
            assert np.isnan(by_set[0]).all()
            assert same_bits(by_set[1:], clean_by_set[1:])
