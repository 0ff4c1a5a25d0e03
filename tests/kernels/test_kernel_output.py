"""The backward pass that takes the activation's slope from y: the same gradients, without the residual."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import (
    DTYPES,
    KINKS,
    SHAPES,
    TOLERANCES,
    Case,
    Moments,
    Sums,
    assert_guards,
    backward,
    check_gradients,
    forward,
    like,
    make_case,
    numpy_dtype,
    oracle_forward,
    place,
    same_bits,
)

from flatwater import kernels
from flatwater.spec import SLOPE_IN_OUTPUT, Activation

LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["NCL", "NLC"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
TOLD = pytest.mark.parametrize("activation", SLOPE_IN_OUTPUT)


def case_of(*arguments, **options) -> Case:
    """A case whose dy is 0 also where y is a kink only because its dtype has rounded it."""
    case = make_case(*arguments, **options)
    z = oracle_forward(make_case(*arguments, **(options | {"activation": "none"}))).y
    for kink in KINKS[case.activation]:
        case.dy[np.abs(z - kink) <= 2 * TOLERANCES[case.dtype].rounding * abs(kink)] = 0
    return case


def check(case: Case, *, frozen: bool = False, offset: int = 0) -> None:
    """By y as by the residual, and as the oracle has it."""
    y, moments = forward(case, offset)
    before = y.tobytes()
    found = backward(case, moments, frozen=frozen, y=y, offset=offset)
    assert y.tobytes() == before
    assert same_bits(found.dresidual, backward(case, moments, frozen=frozen, offset=offset).dresidual)
    statistics = oracle_forward(case).statistics
    check_gradients(case, backward(case, Moments.of(statistics), frozen=frozen, y=y), statistics, frozen=frozen)


@TOLD
@LAYOUTS
@EVERY_DTYPE
def test_gradients_by_the_output_are_the_oracles(dtype: str, channels_last: bool, activation: Activation) -> None:
    for seed, (shape, residual) in enumerate(product(SHAPES, [True, False])):
        options = {"channels_last": channels_last, "activation": activation, "residual": residual, "seed": seed}
        check(case_of(shape, dtype, **options))
        check(case_of(shape, dtype, **options), frozen=True)
        for groups in {1, shape[1]}:
            check(case_of(shape, dtype, groups=groups, **options))


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 70)),
    st.sampled_from(DTYPES),
    st.sampled_from(SLOPE_IN_OUTPUT),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.integers(0, 17),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_at_any_address(shape, dtype, activation, channels_last, affine, seed, offset) -> None:
    options = {"channels_last": channels_last, "activation": activation, "residual": True, "affine": affine}
    check(case_of(shape, dtype, seed=seed, offset=offset, **options), offset=17 - offset)


@LAYOUTS
def test_tensors_beyond_every_cache(channels_last: bool) -> None:
    check(case_of((3, 5, 299_993), channels_last=channels_last, activation="relu", residual=True, offset=3), offset=7)


@LAYOUTS
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 3, 0), (2, 0, 5)])
def test_no_elements(shape: tuple[int, int, int], channels_last: bool) -> None:
    case = make_case(shape, channels_last=channels_last, activation="relu", residual=True)
    found = backward(case, Moments(np.zeros(shape[1]), np.zeros(shape[1]), np.ones(shape[1])), y=like(case.x))
    assert not found.sums.dz.any()
    assert not found.sums.dz_xhat.any()


@EVERY_DTYPE
@LAYOUTS
def test_two_halves_make_a_whole_bit_for_bit(channels_last: bool, dtype: str) -> None:
    for shape in SHAPES:
        case = make_case(shape, dtype, channels_last=channels_last, activation="leaky_relu", residual=True)
        y, moments = forward(case)
        whole = backward(case, moments, y=y)
        sums, dx, dresidual = Sums.empty(case.channels), like(case.x), like(case.x)
        options = case.given() | moments.normalizing() | sums.given() | {"residual": None, "y": case.buffer(y)}
        seen = case.buffer(case.dy), case.buffer(case.x)
        kernels.batch_gradient_sums(*seen, **options)
        count = shape[0] * shape[2]
        kernels.batch_input_gradient(*seen, case.buffer(dx), case.buffer(dresidual), count=count, **options)
        assert_guards(dx, dresidual, sums.dz, sums.dz_xhat)
        assert same_bits(sums.dz, whole.sums.dz)
        assert same_bits(sums.dz_xhat, whole.sums.dz_xhat)
        assert same_bits(dx, whole.dx)
        assert same_bits(dresidual, whole.dresidual)


@pytest.mark.parametrize("length", [1, 24], ids=["scalars", "vectors"])
@LAYOUTS
@EVERY_DTYPE
@TOLD
def test_at_the_kinks(activation: Activation, dtype: str, channels_last: bool, length: int) -> None:
    """And at their neighbours in the elements' dtype: z is the residual, for x̂ is nothing."""
    store = numpy_dtype(dtype)
    near_six = np.array([6 * (1 - 2.0**-8), 6, 6 * (1 + 2.0**-6)])  # a step of bfloat16, the coarsest
    tiny = float(np.array(1).astype(np.uint16 if store.itemsize == 2 else f"uint{8 * store.itemsize}").view(store))
    z = np.concatenate([[-0.0, 0.0, tiny, -tiny, 99 * tiny, -99 * tiny, np.nan, np.inf, -np.inf], near_six])
    z = np.repeat(z.astype(store)[:, None], length, 1)[:, None, :]
    z = np.ascontiguousarray(z.transpose(0, 2, 1)) if channels_last else z
    parameter = np.float64 if dtype == "float64" else np.float32
    case = Case(
        x=place(np.full(z.shape, -0.0), store),
        dy=place(np.linspace(0.5, 1.5, z.size).reshape(z.shape), store),
        residual=place(z, store),
        weight=np.ones(1, parameter),
        bias=np.full(1, -0.0, parameter),  # or x̂ + β would be 0, and z never -0
        activation=activation,
        channels_last=channels_last,
        dtype=dtype,
    )
    constants = {"mean": np.zeros(1), "inv_std": np.ones(1)}
    y = like(case.x)
    kernels.batch_normalize(case.buffer(case.x), case.buffer(y), **constants, **case.given())
    moments = Moments(np.zeros(1), np.zeros(1), np.ones(1))
    found, expected = (backward(case, moments, frozen=True, y=output).dresidual for output in (y, None))
    assert same_bits(found, expected)
