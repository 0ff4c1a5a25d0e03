"""A step is the checked functions in two calls: the same bits for every output, gradient and statistic."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_harness import DTYPES, EPSILON, Case, assert_guards, backward, forward, guarded, like, make_case, same_bits

from flatwater import kernels
from flatwater.kernels.buffer import address


def begin(case: Case) -> kernels.Step:
    return kernels.begin(
        case.buffer(case.x).shape,
        case.dtype,
        channels_last=case.channels_last,
        activation=case.activation,
        epsilon=EPSILON,
        groups=case.groups,
    )


def where(array: np.ndarray | None) -> int:
    return 0 if array is None else address(array)


def run_forward(step: kernels.Step, case: Case) -> np.ndarray:
    y = like(case.x)
    step.forward(*map(where, (case.x, y, case.residual, case.weight, case.bias)))
    assert_guards(y)
    return y


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCL", "NLC"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 6, 35), (5, 3, 4), (0, 3, 5), (2, 3, 0)])
def test_a_step_computes_what_the_functions_compute(
    shape: tuple[int, int, int], dtype: str, channels_last: bool, groups: int | None
) -> None:
    case = make_case(shape, dtype, channels_last=channels_last, activation="relu", residual=True, groups=groups)
    expected, moments = forward(case)

    step = begin(case)
    assert same_bits(run_forward(step, case), expected)
    for name, values in moments.all().items():
        assert same_bits(getattr(step, name), values), name
    dx, dresidual = like(case.x), like(case.x)
    dweight, dbias = like(case.weight), like(case.bias)
    for residual, y in ((case.residual, None), (None, expected)):
        gradients = backward(case, moments, y=y)
        dx[...] = dresidual[...] = np.nan
        step.backward(*map(where, (case.dy, case.x, residual, y, dx, dresidual, dweight, dbias)))
        assert_guards(dx, dresidual, dweight, dbias)
        assert same_bits(dx, gradients.dx)
        assert same_bits(dresidual, gradients.dresidual)
        assert same_bits(dweight, gradients.sums.dz_xhat.astype(dweight.dtype))
        assert same_bits(dbias, gradients.sums.dz.astype(dbias.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_stand_for_the_batchs_statistics(dtype: str) -> None:
    case = make_case((4, 6, 35), dtype, activation="hardswish")
    store = case.weight.dtype
    mean, variance = np.linspace(-1, 1, 6).astype(store), np.linspace(0.5, 2, 6).astype(store)
    mean64, inv_std = mean.astype(np.float64), 1 / np.sqrt(variance.astype(np.float64) + EPSILON)
    expected = like(case.x)
    kernels.batch_normalize(case.buffer(case.x), case.buffer(expected), mean=mean64, inv_std=inv_std, **case.given())

    step = begin(case)
    step.freeze(where(mean), where(variance))
    assert same_bits(run_forward(step, case), expected)
    moments = forward(case)[1]
    moments.mean[...], moments.inv_std[...] = mean64, inv_std
    dx = like(case.x)
    step.backward(*map(where, (case.dy, case.x, None, None, dx, None, None, None)))
    assert same_bits(dx, backward(case, moments, frozen=True).dx)


def test_the_running_statistics_follow_as_those_of_the_functions_do() -> None:
    case = make_case((4, 6, 35))
    moments = forward(case)[1]
    ours, theirs = (guarded((2, 6), np.float32) for _ in range(2))
    ours[...] = theirs[...] = 1.0
    kernels.update_running(
        *map(kernels.Vector.from_numpy, theirs),
        mean=moments.mean,
        m2=moments.m2,
        count=4 * 35,
        momentum=0.9,
        unbiased=True,
    )
    step = begin(case)
    run_forward(step, case)
    step.update(where(ours[0]), where(ours[1]), 0.9, True)
    assert same_bits(ours, theirs)


def test_the_statistics_outlive_the_names_that_lead_to_them() -> None:
    case = make_case((4, 6, 35))
    expected = forward(case)[1].mean
    step = begin(case)
    run_forward(step, case)
    mean = step.mean
    del step
    assert same_bits(mean, expected)


def test_parameters_are_those_of_the_forward_pass() -> None:
    case = make_case((4, 6, 35), activation="relu")
    expected = backward(case, forward(case)[1]).dx
    step = begin(case)
    run_forward(step, case)
    case.weight[...] = np.nan  # an optimizer step in between
    dx = like(case.x)
    step.backward(*map(where, (case.dy, case.x, None, None, dx, None, None, None)))
    assert same_bits(dx, expected)
