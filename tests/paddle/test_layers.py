"""Layers in training, against the float64 oracle and against Paddle's own layers."""

from __future__ import annotations

import warnings

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import TOLERANCE, assert_close, assert_same_step, oracle, randomise, step, tensor_of

import flatwater.paddle as fw
from flatwater.errors import InputError, SingleValueError

# Paddle's own error comes on top of ours: its float32 sums are naive, and in float64 its operators hold
# ε and momentum as float32, which moves 1e-5 and 0.9 by 3e-8 of themselves.
PEER_TOLERANCE = {"float32": 8 * TOLERANCE["float32"], "float64": 1e-7}

ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "hardswish", "swish")

# layer, Paddle's layer, input shape
BATCH = [
    (fw.BatchNorm, paddle.nn.BatchNorm, {}, (7, 5)),
    (fw.BatchNorm, paddle.nn.BatchNorm, {}, (3, 5, 11)),
    (fw.BatchNorm, paddle.nn.BatchNorm, {}, (2, 5, 17, 19)),
    (fw.BatchNorm, paddle.nn.BatchNorm, {}, (2, 5, 3, 1, 4)),
    (fw.BatchNorm, paddle.nn.BatchNorm, {"data_layout": "NHWC"}, (2, 4, 3, 5)),
    (fw.BatchNorm1D, paddle.nn.BatchNorm1D, {}, (13, 5)),
    (fw.BatchNorm1D, paddle.nn.BatchNorm1D, {}, (3, 5, 7)),
    (fw.BatchNorm1D, paddle.nn.BatchNorm1D, {"data_format": "NLC"}, (3, 7, 5)),
    (fw.BatchNorm2D, paddle.nn.BatchNorm2D, {"momentum": 0.5, "epsilon": 1e-3}, (1, 5, 31, 1)),
    (fw.BatchNorm2D, paddle.nn.BatchNorm2D, {"data_format": "NHWC"}, (3, 7, 7, 5)),
    (fw.BatchNorm2D, paddle.nn.BatchNorm2D, {"use_global_stats": True}, (3, 5, 4, 4)),
    (fw.BatchNorm3D, paddle.nn.BatchNorm3D, {}, (2, 5, 2, 3, 4)),
    (fw.BatchNorm3D, paddle.nn.BatchNorm3D, {"data_format": "NDHWC"}, (2, 2, 3, 4, 5)),
]
SAMPLE = [
    (fw.GroupNorm, paddle.nn.GroupNorm, (3, 6), {}, (2, 6, 5, 7)),
    (fw.GroupNorm, paddle.nn.GroupNorm, (1, 6), {}, (1, 6, 3)),
    (fw.GroupNorm, paddle.nn.GroupNorm, (6, 6), {"data_format": "NHWC"}, (2, 4, 5, 6)),
    (fw.GroupNorm, paddle.nn.GroupNorm, (2, 6), {"weight_attr": False}, (2, 6, 2, 3, 4)),
    (fw.InstanceNorm1D, paddle.nn.InstanceNorm1D, (5,), {}, (2, 5, 9)),
    (fw.InstanceNorm2D, paddle.nn.InstanceNorm2D, (5,), {}, (2, 5, 9, 3)),
    (fw.InstanceNorm2D, paddle.nn.InstanceNorm2D, (5,), {"weight_attr": False, "bias_attr": False}, (2, 5, 9, 3)),
    (fw.InstanceNorm3D, paddle.nn.InstanceNorm3D, (5,), {}, (2, 5, 2, 3, 4)),
]
CASES = [(ours, theirs, (5,), options, shape) for ours, theirs, options, shape in BATCH] + SAMPLE


def identify(value: object) -> str:
    return value.__name__ if isinstance(value, type) else str(value)


def random_arrays(shape: tuple[int, ...], dtype: str, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(len(shape))
    return [random.standard_normal(shape).astype(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("ours", "theirs", "arguments", "options", "shape"), CASES, ids=identify)
def test_a_step_equals_paddles_and_the_oracles(ours, theirs, arguments, options, shape, dtype) -> None:
    x, dy = random_arrays(shape, dtype, 2)
    mine, stock = ours(*arguments, **options), theirs(*arguments, **options)
    for layer in (mine, stock):
        layer.to(dtype=dtype)
        randomise(layer)
    assert isinstance(mine, theirs)
    assert fw.backend_of(mine, tensor_of(x)) == "flatwater"
    expected = oracle(mine, x, dy)
    found = step(mine, x, dy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stock layers warn at every training step that they track statistics
        peer = step(stock, x, dy)
    assert_same_step(found, expected, TOLERANCE[dtype])
    if options != {"weight_attr": False}:  # Paddle 3.3.1: GroupNorm without γ has a wrong dx (ours is the oracle's)
        assert_same_step(found, peer, PEER_TOLERANCE[dtype])


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("layer_type", ["batch", "frozen", "group", "instance"])
def test_activation_and_residual_are_fused(act: str | None, with_residual: bool, layer_type: str) -> None:
    x, dy, residual = random_arrays((3, 6, 5, 7), "float32", 3)
    layer = {
        "batch": lambda: fw.BatchNorm2D(6, act=act),
        "frozen": lambda: fw.BatchNorm2D(6, act=act, use_global_stats=True),
        "group": lambda: fw.GroupNorm(2, 6, act=act),
        "instance": lambda: fw.InstanceNorm2D(6, act=act),
    }[layer_type]()
    randomise(layer)
    added = residual if with_residual else None
    expected = oracle(layer, x, dy, added)
    assert_same_step(step(layer, x, dy, added), expected, TOLERANCE["float32"])


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_eval_takes_paddles_operators_and_computes_the_same(act: str | None) -> None:
    x, residual = random_arrays((3, 6, 5, 7), "float32", 2)
    layer = fw.BatchNorm2D(6, act=act)
    randomise(layer)
    frozen = fw.BatchNorm2D(6, act=act, use_global_stats=True)
    frozen.set_state_dict(layer.state_dict())
    layer.eval()
    before = {name: value.numpy().copy() for name, value in layer.state_dict().items()}
    assert fw.backend_of(layer, tensor_of(x)) == "paddle"
    assert fw.backend_of(frozen, tensor_of(x)) == "flatwater"
    y = layer(tensor_of(x), tensor_of(residual))
    assert_close(y.numpy(), frozen(tensor_of(x), tensor_of(residual)).numpy(), TOLERANCE["float32"], "y")
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("kind", "data_format", "shape"),
    [
        (fw.InstanceNorm1D, "NCL", (2, 5, 9)),
        (fw.InstanceNorm1D, "NLC", (2, 9, 5)),
        (fw.InstanceNorm2D, "NCHW", (2, 5, 9, 3)),
        (fw.InstanceNorm2D, "NHWC", (2, 9, 3, 5)),
        (fw.InstanceNorm3D, "NCDHW", (2, 5, 2, 3, 4)),
        (fw.InstanceNorm3D, "NDHWC", (2, 2, 3, 4, 5)),
    ],
)
def test_instance_norm_in_eval_and_captured_in_every_format(kind, data_format, shape, affine, dtype) -> None:
    """Paddle's own operator refuses channels last."""
    x, dy = random_arrays(shape, dtype, 2)
    attributes = {} if affine else {"weight_attr": False, "bias_attr": False}
    layer = kind(5, data_format=data_format, act="relu", **attributes)
    layer.to(dtype=dtype)
    randomise(layer)
    expected = oracle(layer, x, dy)
    layer.eval()
    assert fw.backend_of(layer, tensor_of(x)) == "paddle"
    assert_same_step(step(layer, x, dy), expected, PEER_TOLERANCE[dtype])
    captured = paddle.jit.to_static(layer, full_graph=True)
    assert_close(captured(tensor_of(x)).numpy(), expected.y, PEER_TOLERANCE[dtype], "y")


def test_eval_means_the_moving_statistics_whatever_use_global_stats_says() -> None:
    (x,) = random_arrays((3, 6, 5, 7), "float32", 1)
    results = []
    for kind in (fw.BatchNorm, fw.BatchNorm2D):
        for option in (None, False, True):
            layer = kind(6, use_global_stats=option)
            randomise(layer)
            layer.eval()
            results.append(layer(tensor_of(x)).numpy())
    for y in results[1:]:
        np.testing.assert_array_equal(y, results[0])


shapes = st.lists(st.integers(1, 9), min_size=2, max_size=5)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, act=st.sampled_from(ACTIVATIONS), channels_last=st.booleans(), seed=st.integers(0, 2**31))
def test_batch_norm_infers_its_form(shape: list[int], act: str | None, channels_last: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    x, dy = (random.standard_normal(shape).astype("float64") for _ in range(2))
    channels_last = channels_last and len(shape) > 2
    channels = shape[-1] if channels_last else shape[1]
    layer = fw.BatchNorm(channels, act=act, dtype="float64", data_layout="NHWC" if channels_last else "NCHW")
    if x.size == channels:
        with pytest.raises(SingleValueError, match=r"one value per channel.*input shape"):
            layer(tensor_of(x))
        return
    randomise(layer)
    expected = oracle(layer, x, dy)
    # Two values per channel lie symmetrically about their mean: x̂ is ±1 and dx is what is left of two equal
    # numbers. An ε of 1e-5 under a small variance magnifies the rounding of that by up to inv_std.
    spread = float(
        np.max(
            1 / np.sqrt(x.var(axis=tuple(i for i in range(x.ndim) if i != (x.ndim - 1 if channels_last else 1))) + 1e-5)
        )
    )
    assert_same_step(step(layer, x, dy), expected, TOLERANCE["float64"] * max(1.0, spread) ** 2)


def test_any_strides_will_do() -> None:
    (x,) = random_arrays((4, 3, 6, 5), "float32", 1)
    layer = fw.BatchNorm2D(6, act="relu")
    view = tensor_of(x).transpose([0, 2, 1, 3])
    assert not view.is_contiguous()
    expected = layer(tensor_of(np.ascontiguousarray(x.transpose(0, 2, 1, 3))))
    np.testing.assert_array_equal(layer(view).numpy(), expected.numpy())
    part = tensor_of(x)[1:3].transpose([0, 2, 1, 3])[:, :, ::2]
    whole = tensor_of(np.ascontiguousarray(x[1:3].transpose(0, 2, 1, 3)[:, :, ::2]))
    np.testing.assert_array_equal(layer(part).numpy(), layer(whole).numpy())


@pytest.mark.parametrize("kind", ["NaN", "Inf"])
def test_what_is_not_a_number_spoils_its_channel_and_no_other(kind: str) -> None:
    x, dy = random_arrays((3, 6, 5, 7), "float32", 2)
    x[1, 2, 3, 4] = np.nan if kind == "NaN" else np.inf
    found = step(fw.BatchNorm2D(6), x, dy)
    healthy = [0, 1, 3, 4, 5]
    assert np.isnan(found.y[:, 2]).all()
    assert np.isnan(found.statistics["_variance"][2])
    assert np.isfinite(found.y[:, healthy]).all()
    assert np.isfinite(found.gradients["x"][:, healthy]).all()


def test_a_mean_of_ten_thousand_deviations() -> None:
    x, dy = random_arrays((4, 6, 16, 16), "float32", 2)
    x += np.float32(1e4)
    layer = fw.BatchNorm2D(6)
    expected = oracle(layer, x, dy)
    found = step(layer, x, dy)
    assert_close(found.y, expected.y, TOLERANCE["float32"], "y")
    assert_close(found.statistics["_variance"], expected.statistics["_variance"], 1e-6, "_variance")


def test_an_empty_batch_changes_nothing() -> None:
    layer = fw.BatchNorm2D(6, act="relu")
    randomise(layer)
    before = layer._mean.numpy().copy()
    x = tensor_of(np.zeros((0, 6, 4, 4), "float32"))
    y = layer(x * 1.0)
    y.sum().backward()
    assert list(y.shape) == [0, 6, 4, 4]
    np.testing.assert_array_equal(layer._mean.numpy(), before)
    np.testing.assert_array_equal(layer.weight.grad.numpy(), np.zeros(6))


def test_a_single_value_can_pass_through_as_in_paddle() -> None:
    (x,) = random_arrays((1, 6, 1, 1), "float32", 1)
    layer = fw.BatchNorm2D(6, single_value="passthrough", act="relu")
    randomise(layer)
    before = layer._mean.numpy().copy()
    np.testing.assert_array_equal(layer(tensor_of(x)).numpy(), np.maximum(x, 0))
    np.testing.assert_array_equal(layer._mean.numpy(), before)
    layer.eval()
    assert not np.array_equal(layer(tensor_of(x)).numpy(), np.maximum(x, 0))


def test_parameters_that_need_no_gradient_get_none() -> None:
    x, dy = random_arrays((3, 6, 5, 7), "float32", 2)
    layer = fw.BatchNorm2D(6)
    layer.weight.stop_gradient = True
    assert step(layer, x, dy).gradients.keys() == {"x", "bias"}
    without = fw.BatchNorm2D(6, weight_attr=False, bias_attr=False)
    assert_same_step(
        step(without, x, dy), oracle(fw.BatchNorm2D(6, weight_attr=False, bias_attr=False), x, dy), TOLERANCE["float32"]
    )


def test_initial_values_of_ones_own() -> None:
    constant = paddle.nn.initializer.Constant
    layer = fw.ConvBNLayer(
        3,
        8,
        bn_weight_attr=paddle.ParamAttr(initializer=constant(0.25)),
        bn_bias_attr=paddle.ParamAttr(initializer=constant(-0.5)),
    )
    np.testing.assert_array_equal(layer.bn.weight.numpy(), np.full(8, 0.25, "float32"))
    np.testing.assert_array_equal(layer.bn.bias.numpy(), np.full(8, -0.5, "float32"))


def test_conv_bn_layer_is_convolution_norm_activation() -> None:
    x, residual = random_arrays((2, 4, 8, 8), "float32", 2)
    layer = fw.ConvBNLayer(4, 4, groups=2, act="hardswish")
    assert layer.conv.bias is None
    z = layer.bn._mean.numpy()
    plain = fw.BatchNorm2D(4)
    plain.set_state_dict(layer.bn.state_dict())
    expected = paddle.nn.functional.hardswish(plain(layer.conv(tensor_of(x))) + tensor_of(residual))
    found = layer(tensor_of(x), tensor_of(residual))
    assert_close(found.numpy(), expected.numpy(), TOLERANCE["float32"], "y")
    assert not np.array_equal(layer.bn._mean.numpy(), z)
    strided = fw.ConvBNLayer(4, 6, kernel_size=1, stride=2, padding=0)
    assert list(strided(tensor_of(x)).shape) == [2, 6, 4, 4]


@pytest.mark.parametrize(
    ("make", "shape", "dtype", "message"),
    [
        (
            lambda: fw.BatchNorm2D(6),
            (3, 6, 5),
            "float32",
            r"BatchNorm2D 'batch_norm2d_\d+' got .*\[3, 6, 5\]; it takes rank 4",
        ),
        (lambda: fw.BatchNorm1D(6), (3, 6, 5, 5), "float32", "takes rank 2 or 3"),
        (lambda: fw.BatchNorm(6), (6,), "float32", "takes rank 2 or more"),
        (lambda: fw.BatchNorm2D(6), (3, 5, 4, 4), "float32", "has 6 channels but its input .* has 5"),
        (lambda: fw.BatchNorm2D(6, data_format="NHWC"), (3, 6, 4, 4), "float32", "has 4"),
        (lambda: fw.BatchNorm2D(6), (3, 6, 4, 4), "int64", "got int64 input; normalization needs floats"),
        (lambda: fw.BatchNorm2D(6), (3, 6, 4, 4), "float64", "float32 parameters but got float64 input"),
        (lambda: fw.GroupNorm(2, 6), (3, 4, 4, 4), "float32", "has 6 channels"),
        (lambda: fw.InstanceNorm2D(6), (3, 6, 4), "float32", "takes rank 4"),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bad_input_names_the_layer_and_the_remedy(make, shape, dtype, message, training) -> None:
    layer = make()
    layer.train() if training else layer.eval()
    with pytest.raises(InputError, match=message):
        layer(paddle.zeros(shape, dtype=dtype))


def test_bad_arguments_are_refused_when_the_layer_is_made() -> None:
    with pytest.raises(InputError, match=r"momentum=1\.9"):
        fw.BatchNorm2D(6, momentum=1.9)
    with pytest.raises(InputError, match="act='gelu'"):
        fw.BatchNorm2D(6, act="gelu")
    with pytest.raises(InputError, match="single_value='warn'"):
        fw.BatchNorm2D(6, single_value="warn")
    with pytest.raises(InputError, match="does not divide"):
        fw.GroupNorm(4, 6)
    with pytest.raises(InputError, match="residual of shape"):
        fw.BatchNorm2D(6)(paddle.zeros([2, 6, 4, 4]), paddle.zeros([2, 6, 4, 1]))
    with pytest.raises(InputError, match="not a norm layer"):
        fw.backend_of(paddle.nn.BatchNorm2D(6), paddle.zeros([2, 6, 4, 4]))
