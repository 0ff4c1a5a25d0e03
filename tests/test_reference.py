"""The oracle is held against calculus, against the papers' definitions, and against Paddle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatwater import reference
from flatwater.errors import InputError
from flatwater.spec import ACTIVATIONS, Activation

# Two-sided differences of step h err by about h²/6 of the third derivative plus eps/h of the value; with
# h = 1e-5 and float64 both stay near 1e-10 for values and derivatives of order 1. Sums here have < 100 terms.
STEP = 1e-5
DIFFERENCE_TOLERANCE = 1e-6

# One rounding to float64 at the end of a computation in a longer float.
ROUNDING = 1e-14

KINKS = {"none": (), "swish": (), "relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}

shapes = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4, 6]), st.lists(st.integers(1, 3), max_size=3).map(tuple))


def central_difference(function: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    gradient = np.empty_like(at)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = STEP
        gradient[index] = (function(at + step) - function(at - step)) / (2 * STEP)
    return gradient


class Problem:
    """A random normalization whose z stays away from the kinks of the activation."""

    def __init__(self, seed: int, samples: int, channels: int, spatial: tuple[int, ...], axis: int, groups: int):
        generator = np.random.default_rng(seed)
        shape = (samples, channels, *spatial) if axis == 1 else (samples, *spatial, channels)
        self.x, self.residual, self.dy = generator.standard_normal((3, *shape))
        self.weight, self.bias = generator.standard_normal((2, channels))
        self.axis, self.groups = axis, groups

    def kwargs(self, activation: Activation) -> dict:
        return {
            "weight": self.weight,
            "bias": self.bias,
            "residual": self.residual,
            "activation": activation,
            "epsilon": 0.1,  # few elements: their variance may vanish, and the third derivative explode
            "axis": self.axis,
        }

    def move_from_kinks(self, activation: Activation, forward: Callable[..., reference.Forward]) -> None:
        """Shift the residual where z is within reach of the steps: x alone decides x̂, so z moves as much."""
        z = forward(self.x, **self.kwargs("none")).y
        for kink in KINKS[activation]:
            self.residual = np.where(np.abs(z - kink) < 1e-3, self.residual + 1e-2, self.residual)


def check_gradients(
    problem: Problem,
    activation: Activation,
    forward: Callable[..., reference.Forward],
    backward: Callable[..., reference.Gradients],
) -> None:
    problem.move_from_kinks(activation, forward)
    given_ = problem.kwargs(activation)
    gradients = backward(problem.dy, problem.x, **given_)

    def loss_in(name: str) -> Callable[[np.ndarray], float]:
        return lambda value: float(np.sum(problem.dy * forward(**({"x": problem.x} | given_ | {name: value})).y))

    for name, at in [("x", problem.x), *((name, given_[name]) for name in ("weight", "bias", "residual"))]:
        expected = central_difference(loss_in(name), at)
        np.testing.assert_allclose(
            getattr(gradients, name), expected, rtol=DIFFERENCE_TOLERANCE, atol=DIFFERENCE_TOLERANCE, err_msg=name
        )


@given(shapes, st.sampled_from([1, -1]), st.sampled_from(ACTIVATIONS), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_batch_norm_gradients_are_the_derivatives(shape, axis, activation, seed) -> None:
    problem = Problem(seed, *shape, axis, groups=1)
    check_gradients(problem, activation, reference.batch_norm, reference.batch_norm_gradients)


@given(shapes, st.sampled_from([1, -1]), st.sampled_from(ACTIVATIONS), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_frozen_gradients_are_the_derivatives(shape, axis, activation, seed) -> None:
    generator = np.random.default_rng(seed)
    mean, variance = generator.standard_normal(shape[1]), generator.uniform(0.5, 2, shape[1])
    statistics = reference.Statistics(mean, variance, count=0)

    def forward(x, **given_):
        return reference.batch_norm(x, statistics=statistics, **given_)

    def backward(dy, x, **given_):
        return reference.batch_norm_gradients(dy, x, statistics=statistics, **given_)

    check_gradients(Problem(seed, *shape, axis, groups=1), activation, forward, backward)


@given(shapes, st.sampled_from([1, -1]), st.sampled_from(ACTIVATIONS), st.integers(0, 2**32), st.data())
@settings(max_examples=30, deadline=None)
def test_group_norm_gradients_are_the_derivatives(shape, axis, activation, seed, data) -> None:
    groups = data.draw(st.sampled_from([g for g in range(1, shape[1] + 1) if shape[1] % g == 0]))

    def forward(x, **given_):
        return reference.group_norm(x, groups, **given_)

    def backward(dy, x, **given_):
        return reference.group_norm_gradients(dy, x, groups, **given_)

    check_gradients(Problem(seed, *shape, axis, groups), activation, forward, backward)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_gradients_are_the_derivatives(activation: Activation) -> None:
    z = np.linspace(-20, 20, 4001) + 0.003  # never within a step of an integer kink
    difference = (reference.activate(activation, z + STEP) - reference.activate(activation, z - STEP)) / (2 * STEP)
    np.testing.assert_allclose(
        reference.activation_gradient(activation, z), difference, rtol=DIFFERENCE_TOLERANCE, atol=DIFFERENCE_TOLERANCE
    )


@pytest.mark.parametrize(
    ("activation", "slopes"),
    [
        ("relu", {0: 0}),
        ("relu6", {0: 0, 6: 0}),
        ("leaky_relu", {0: 1}),
        ("hardswish", {-3: 0, 3: 1}),
    ],
)
def test_slopes_at_the_kinks(activation: Activation, slopes: dict[int, float]) -> None:
    assert {z: reference.activation_gradient(activation, z).item() for z in slopes} == slopes


def test_swish_of_large_arguments_neither_overflows_nor_warns() -> None:
    np.testing.assert_allclose(reference.activate("swish", [-1e5, 1e5]), [0, 1e5], atol=1e-300)
    np.testing.assert_allclose(reference.activation_gradient("swish", [-1e5, 1e5]), [0, 1], atol=1e-300)


def test_batch_norm_is_its_definition() -> None:
    """Channel by channel, by Ioffe & Szegedy's algorithm 1."""
    x = np.random.default_rng(0).standard_normal((5, 3, 4, 2))
    weight, bias, epsilon = np.array([1.0, 2.0, -3.0]), np.array([0.5, 0.0, 1.0]), 1e-3
    y, statistics = reference.batch_norm(x, weight=weight, bias=bias, epsilon=epsilon)
    assert statistics.count == 5 * 4 * 2
    for channel in range(3):
        values = x[:, channel]
        mean, variance = values.mean(), values.var()
        expected = weight[channel] * (values - mean) / np.sqrt(variance + epsilon) + bias[channel]
        np.testing.assert_allclose(y[:, channel], expected, rtol=ROUNDING, atol=ROUNDING)
        np.testing.assert_allclose(statistics.mean[channel], mean, rtol=ROUNDING, atol=ROUNDING)
        np.testing.assert_allclose(statistics.variance[channel], variance, rtol=ROUNDING, atol=ROUNDING)


def test_group_norm_is_its_definition() -> None:
    """Sample by sample and group by group, by Wu & He's equations 1, 2 and 7."""
    x = np.random.default_rng(1).standard_normal((3, 6, 5))
    y, statistics = reference.group_norm(x, 2, epsilon=0.0)
    assert statistics.mean.shape == statistics.variance.shape == (3, 2)
    for sample in range(3):
        for group in range(2):
            channels = slice(3 * group, 3 * group + 3)
            values = x[sample, channels]
            np.testing.assert_allclose(y[sample, channels], (values - values.mean()) / values.std(), atol=ROUNDING)


def test_the_three_norms_meet_where_their_sets_do() -> None:
    x, dy = np.random.default_rng(2).standard_normal((2, 1, 6, 3, 4))
    batch, instance = reference.batch_norm(x), reference.instance_norm(x)
    np.testing.assert_array_equal(batch.y, instance.y)
    for one, other in zip(reference.batch_norm_gradients(dy, x), reference.instance_norm_gradients(dy, x), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(instance.y, reference.group_norm(x, 6).y)


@given(shapes, st.sampled_from(ACTIVATIONS), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_the_axis_is_only_a_matter_of_storage(shape, activation, seed) -> None:
    problem = Problem(seed, *shape, axis=1, groups=1)
    first = problem.kwargs(activation)
    last = first | {"axis": -1, "residual": np.moveaxis(problem.residual, 1, -1)}
    dy, x = np.moveaxis(problem.dy, 1, -1), np.moveaxis(problem.x, 1, -1)

    y = reference.batch_norm(x, **last).y
    np.testing.assert_allclose(np.moveaxis(y, -1, 1), reference.batch_norm(problem.x, **first).y, atol=ROUNDING)
    gradients = reference.batch_norm_gradients(dy, x, **last)
    expected = reference.batch_norm_gradients(problem.dy, problem.x, **first)
    np.testing.assert_allclose(np.moveaxis(gradients.x, -1, 1), expected.x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradients.weight, expected.weight, rtol=1e-12, atol=1e-12)


def test_statistics_survive_a_mean_of_ten_thousand_deviations() -> None:
    """Shifting by a number that float64 adds exactly moves the mean by it, and the variance not at all."""
    x = np.round(np.random.default_rng(3).standard_normal((64, 2, 7, 7)) * 2**20) / 2**20
    plain, shifted = reference.batch_statistics(x), reference.batch_statistics(x + 2.0**14)
    np.testing.assert_allclose(shifted.mean - 2.0**14, plain.mean, rtol=0, atol=2.0**14 * np.finfo(np.float64).eps)
    np.testing.assert_allclose(shifted.variance, plain.variance, rtol=ROUNDING)


def test_running_statistics() -> None:
    statistics = reference.batch_statistics(np.array([[1.0], [3.0], [5.0]]))
    mean, variance = reference.update_running([10.0], [2.0], statistics, momentum=0.75)
    np.testing.assert_allclose((mean, variance), [[0.75 * 10 + 0.25 * 3], [0.75 * 2 + 0.25 * 8 / 3]], rtol=ROUNDING)
    _, unbiased = reference.update_running([10.0], [2.0], statistics, momentum=0.75, unbiased=True)
    np.testing.assert_allclose(unbiased, [0.75 * 2 + 0.25 * 4], rtol=ROUNDING)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_no_elements_are_no_error(shape: tuple[int, ...]) -> None:
    x = np.empty(shape)
    y, statistics = reference.batch_norm(x, weight=np.ones(shape[1]))
    assert y.shape == shape
    assert statistics.mean.tolist() == statistics.variance.tolist() == [0.0] * shape[1]
    gradients = reference.batch_norm_gradients(x, x)
    assert (gradients.x.shape, gradients.bias.tolist()) == (shape, [0.0] * shape[1])


@pytest.mark.parametrize(
    "call",
    [
        lambda x: reference.batch_norm(x, weight=np.ones(2)),
        lambda x: reference.batch_norm(x, residual=np.ones((2, 3))),
        lambda x: reference.batch_norm_gradients(np.ones((2, 3)), x),
        lambda x: reference.batch_norm(x, statistics=reference.Statistics(np.ones(2), np.ones(2), 1)),
        lambda x: reference.group_norm(x, 2),
        lambda x: reference.group_norm(x, 0),
        lambda x: reference.update_running([0], [1], reference.Statistics(x[0], x[0], 1), unbiased=True),
    ],
)
def test_misuse_is_named(call: Callable[[np.ndarray], object]) -> None:
    with pytest.raises(InputError):
        call(np.zeros((2, 3, 4)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_paddle_agrees_in_float64(activation: Activation) -> None:
    """Forward, gradients and running statistics, with kinks hit exactly by a channel of constants."""
    paddle = pytest.importorskip("paddle")
    functional = paddle.nn.functional
    generator = np.random.default_rng(4)
    x, residual, dy = generator.standard_normal((3, 4, 3, 5, 2))
    x[:, 2] = 7.0  # so z is the residual + β, below
    residual[:, 2] = generator.choice([-3.0, 0.0, 3.0, 6.0], (4, 5, 2))
    weight, bias = np.array([1.5, -2.0, 1.0]), np.array([0.5, 1.0, 0.0])
    epsilon = 2.0**-17  # Paddle keeps ε as a float32, so take one that is

    tensors = [paddle.to_tensor(value, stop_gradient=False) for value in (x, weight, bias, residual)]
    running = [paddle.zeros([3], "float64"), paddle.ones([3], "float64")]
    z = functional.batch_norm(tensors[0], *running, *tensors[1:3], training=True, momentum=0.75, epsilon=epsilon)
    z = z + tensors[3]
    y = z if activation == "none" else getattr(functional, activation)(z)
    y.backward(paddle.to_tensor(dy))

    given_ = {"weight": weight, "bias": bias, "residual": residual, "activation": activation, "epsilon": epsilon}
    expected = reference.batch_norm(x, **given_)
    np.testing.assert_allclose(y.numpy(), expected.y, rtol=1e-12, atol=1e-12)
    for tensor, gradient in zip(tensors, reference.batch_norm_gradients(dy, x, **given_), strict=True):
        np.testing.assert_allclose(tensor.grad.numpy(), gradient, rtol=1e-10, atol=1e-10)
    moved = reference.update_running(np.zeros(3), np.ones(3), expected.statistics, momentum=0.75)
    for tensor, value in zip(running, moved, strict=True):
        np.testing.assert_allclose(tensor.numpy(), value, rtol=1e-12)
