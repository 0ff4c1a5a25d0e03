"""What a norm keeps for its backward pass where a residual is added: gradients, memory, and what must not change."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import paddle
import pytest
from norm_cases import TOLERANCE, assert_close, assert_same_step, oracle, randomise, step, tensor_of
from paddle.autograd import saved_tensors_hooks

import flatwater.paddle as fw
from flatwater.kernels import pool
from flatwater.paddle import memory
from flatwater.paddle.memory import pooled_from
from flatwater.spec import ACTIVATIONS, SLOPE_IN_OUTPUT, Activation

EVERY_ACTIVATION = pytest.mark.parametrize("act", ACTIVATIONS)
TOLD = pytest.mark.parametrize("act", SLOPE_IN_OUTPUT)
KEPT = [act for act in ACTIVATIONS if act not in SLOPE_IN_OUTPUT]

LAYERS: dict[str, Callable[[int, str, str], paddle.nn.Layer]] = {
    "batch": lambda channels, act, layout: fw.BatchNorm2D(channels, act=act, data_format=layout),
    "frozen": lambda channels, act, layout: fw.BatchNorm2D(
        channels, act=act, data_format=layout, use_global_stats=True
    ),
    "group": lambda channels, act, layout: fw.GroupNorm(1, channels, act=act, data_format=layout),
    "instance": lambda channels, act, layout: fw.InstanceNorm2D(channels, act=act, data_format=layout),
}

LARGE = (4, 16, 80, 80)  # its activations lie in the pool


def arrays(shape: tuple[int, ...], dtype: str = "float32", count: int = 3) -> list[np.ndarray]:
    random = np.random.default_rng(sum(shape))
    return [random.standard_normal(shape).astype(dtype) for _ in range(count)]


def leaves(shape: tuple[int, ...], dtype: str = "float32") -> tuple[paddle.Tensor, paddle.Tensor]:
    x, residual = (tensor_of(array) for array in arrays(shape, dtype, 2))
    return x, residual


# --- Gradients ----------------------------------------------------------------------------------------------


@EVERY_ACTIVATION
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_the_oracles(kind: str, layout: str, dtype: str, act: Activation) -> None:
    for shape in ((3, 5, 7, 11), (2, 1, 13, 1), (1, 37, 2, 3), (2, 17, 31, 5), (0, 3, 4, 5)):
        x, dy, residual = arrays(shape, dtype)
        if layout == "NHWC":
            x, dy, residual = (np.ascontiguousarray(a.transpose(0, 2, 3, 1)) for a in (x, dy, residual))
        layer = LAYERS[kind](shape[1], act, layout)
        layer.to(dtype=dtype)
        randomise(layer)
        if 0 in shape and kind == "batch":
            step(layer, x, dy, residual)
            continue  # of nothing the oracle has no statistics
        expected = oracle(layer, x, dy, residual)
        assert_same_step(step(layer, x, dy, residual), expected, TOLERANCE[dtype])


@EVERY_ACTIVATION
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, act: Activation) -> None:
    """Against the oracle on the same values: one rounding of each result, and a kink's side as y shows it."""
    rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    x, dy, residual = (tensor_of(a).astype(dtype).astype("float32").numpy() for a in arrays((3, 5, 7, 11)))
    layer = fw.BatchNorm2D(5, act=act)
    randomise(layer)
    plain = fw.BatchNorm2D(5)
    plain.set_state_dict(layer.state_dict())
    z = oracle(plain, x, dy, residual).y
    dy[(np.abs(z) < 1e-3) | (np.abs(z - 6) < 12 * rounding)] = 0
    expected = oracle(layer, x, dy, residual)
    inputs = [tensor_of(a) for a in (x, residual)]
    y = layer(*(tensor.astype(dtype) for tensor in inputs))
    y.backward(tensor_of(dy).astype(dtype))
    found = {"y": y.astype("float32"), "x": inputs[0].grad, "residual": inputs[1].grad}
    for name, value in {"y": expected.y, **expected.gradients}.items():
        if name in found:
            assert_close(found[name].numpy(), value, 1.01 * rounding, name)


@EVERY_ACTIVATION
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_gradients(kind: str, act: Activation) -> None:
    """Against central differences of the first gradients, in float64: truncation 1e-6, rounding 1e-10."""
    layer = LAYERS[kind](4, act, "NCHW")
    layer.to(dtype="float64")
    randomise(layer)
    random = np.random.default_rng(1)
    point, direction = ([random.standard_normal((2, 4, 3, 3)) for _ in range(3)] for _ in range(2))

    def gradients(values: list[np.ndarray], *, create_graph: bool) -> tuple[list[paddle.Tensor], list[paddle.Tensor]]:
        x, residual, dy = inputs = [tensor_of(value) for value in values]
        y = layer(x * 1.0, residual * 1.0)
        return paddle.grad([y], [x, residual, layer._held().weight], [dy], create_graph=create_graph), inputs

    first, inputs = gradients(point, create_graph=True)
    for one, other in zip(first, gradients(point, create_graph=False)[0], strict=True):
        assert_close(one.numpy(), other.numpy(), 1e-12, "first gradient")
    weights = [random.standard_normal(gradient.shape) for gradient in first]
    total = sum((g * tensor_of(w, stop_gradient=True)).sum() for g, w in zip(first, weights, strict=True))
    second = paddle.grad([total], inputs, allow_unused=True)
    along = sum(float((g * tensor_of(d)).sum()) for g, d in zip(second, direction, strict=True) if g is not None)
    h = 1e-5  # no z of these comes as near to a kink
    ends = [
        gradients([p + s * h * d for p, d in zip(point, direction, strict=True)], create_graph=False)[0]
        for s in (1, -1)
    ]
    pairs = zip(*ends, weights, strict=True)
    numeric = sum(float(((one - other).numpy() * w).sum()) for one, other, w in pairs) / (2 * h)
    assert abs(along - numeric) <= 1e-6 * max(1.0, abs(numeric))


@EVERY_ACTIVATION
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "computed"])
@pytest.mark.parametrize("wanted", [("x",), ("residual",), ("weight",), ("x", "residual", "weight")], ids=str)
def test_paddle_grad_may_ask_for_any_part(wanted: tuple[str, ...], leaf: bool, act: Activation) -> None:
    layer = fw.BatchNorm2D(4, act=act)
    x, residual = leaves((2, 4, 3, 3))
    tensors = {"x": x, "residual": residual, "weight": layer.weight}

    def loss() -> paddle.Tensor:
        return layer(x * 1.0, residual if leaf else residual * 1.0).square().sum()

    loss().backward()
    expected = {name: tensor.grad.numpy() for name, tensor in tensors.items()}
    for name, gradient in zip(wanted, paddle.grad([loss()], [tensors[name] for name in wanted]), strict=True):
        np.testing.assert_array_equal(gradient.numpy(), expected[name])


@EVERY_ACTIVATION
def test_paddle_grad_through_hooks(act: Activation) -> None:
    """What comes back from an offloading hook is another tensor, which knows nothing of the graph."""
    layer = fw.BatchNorm2D(4, act=act)
    x, residual = leaves((2, 4, 3, 3))
    asked = [x, residual, layer.weight]
    expected = paddle.grad([layer(x * 1.0, residual * 1.0).square().sum()], asked)
    packed = []

    def pack(tensor: paddle.Tensor) -> np.ndarray:
        packed.append(tensor.numpy().copy())
        return packed[-1]

    with saved_tensors_hooks(pack, paddle.to_tensor):
        layer(x * 1.0, residual * 1.0)
    assert len(packed) == (3 if act == "none" else 4)
    with saved_tensors_hooks(pack, paddle.to_tensor):
        loss = layer(x * 1.0, residual * 1.0).square().sum()
    for found, wanted in zip(paddle.grad([loss], asked), expected, strict=True):
        np.testing.assert_array_equal(found.numpy(), wanted.numpy())


@EVERY_ACTIVATION
def test_what_needs_no_gradient_gets_none(act: Activation) -> None:
    layer = fw.BatchNorm2D(4, act=act)
    x, residual = leaves((2, 4, 3, 3))
    residual.stop_gradient = True
    y = layer(x, residual)
    y.sum().backward()
    assert residual.grad is None
    assert x.grad is not None
    for parameter in layer.parameters():
        parameter.stop_gradient = True
    x.stop_gradient = True
    assert layer(x, residual).stop_gradient
    residual.stop_gradient = False
    layer(x, residual).backward(paddle.ones_like(x))
    assert residual.grad is not None


@EVERY_ACTIVATION
def test_the_residuals_gradient_shares_no_memory(act: Activation) -> None:
    """Paddle adds to gradients in place: where y's gradient is retained, it must stay what it was."""
    layer = fw.BatchNorm2D(4, act=act)
    x, residual = leaves((2, 4, 3, 3))
    added = residual * 1.0
    y = layer(x, added)
    y.retain_grads()
    ones = paddle.ones_like(y)
    paddle.autograd.backward([y, added * 10.0], [ones, 5.0 * ones])
    np.testing.assert_array_equal(y.grad.numpy(), ones.numpy())


# --- Memory -------------------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], float]]:
    """How many activations of LARGE are alive in the pool, with Python's collector of cycles switched off."""
    monkeypatch.setattr(memory, "_POOLED_FROM", pooled_from({}))
    gc.collect()
    gc.disable()
    before = pool.statistics().in_use
    one = pooled(np.zeros(LARGE))
    block = pool.statistics().in_use - before
    del one
    yield lambda: (pool.statistics().in_use - before) / block
    gc.enable()


def pooled(values: np.ndarray) -> paddle.Tensor:
    """A leaf whose memory is in the pool, where it is counted."""
    given = tensor_of(values.astype("float32"))
    tensor = memory.empty_like(given)
    tensor.copy_(given, True)
    tensor.stop_gradient = False
    return tensor


@EVERY_ACTIVATION
def test_only_what_gradients_are_computed_from_is_kept(act: Activation, held: Callable[[], float]) -> None:
    layer = fw.BatchNorm2D(16, act=act)
    x, residual = map(pooled, arrays(LARGE, count=2))
    y = layer(x, residual)
    ends = y * 1.0  # which keeps nothing
    assert held() == 3
    del residual
    assert held() == (3 if act in KEPT else 2)
    del y
    assert held() == {"none": 1, "hardswish": 2, "swish": 2}.get(act, 2)
    del x
    assert held() == {"none": 1, "hardswish": 2, "swish": 2}.get(act, 2)
    ends.sum().backward()
    del ends
    assert held() == 0


@EVERY_ACTIVATION
@pytest.mark.parametrize("ending", ["nothing", "backward", "grad", "retained", "second"])
def test_a_step_leaves_nothing_behind(ending: str, act: Activation, held: Callable[[], float]) -> None:
    """No cycle leads from what is kept back to it: all is freed at once, with or without a backward pass.

    Two norms, for who asks the graph whether a gradient is wanted may hold on to the nodes before his own.
    """
    layer = fw.BatchNorm2D(16, act=act)
    x, residual = map(pooled, arrays(LARGE, count=2))
    y = layer(layer(x * 1.0, residual * 1.0), residual * 2.0)
    gone = weakref.ref(y)
    if ending == "backward":
        y.sum().backward()
    elif ending == "retained":
        y.sum().backward(retain_graph=True)
    elif ending == "grad":
        paddle.grad(y.sum(), [residual])
    elif ending == "second":
        (gradient,) = paddle.grad(y.square().sum(), [x], create_graph=True)
        gradient.square().sum().backward()
        del gradient
    x.clear_gradient(False)
    residual.clear_gradient(False)
    del x, residual, y
    assert gone() is None
    assert held() == 0


def test_many_steps_hold_as_much_as_one(held: Callable[[], float]) -> None:
    layers = [fw.BatchNorm2D(16, act=act) for act in ACTIVATIONS]
    x = pooled(arrays(LARGE, count=1)[0])
    after = set()
    for _ in range(5):
        y = x
        for layer in layers:
            y = layer(y, y)
        if len(after) == 0:
            y.sum().backward()
            x.clear_gradient(False)
        del y
        after.add(held())
    assert after == {1.0}


# --- Changes in place ---------------------------------------------------------------------------------------


def change(tensor: paddle.Tensor, how: str) -> None:
    match how:
        case "add_":
            tensor.add_(paddle.ones_like(tensor))
        case "item":
            tensor[0] = 3.0
        case "detached":
            tensor.detach().zero_()
        case "view":
            tensor.detach().reshape([-1])[1:3].zero_()


@pytest.mark.parametrize("how", ["add_", "item", "detached", "view"])
@pytest.mark.parametrize("what", ["x", "residual", "y"])
@EVERY_ACTIVATION
def test_a_change_in_place_is_an_error_or_makes_no_difference(act: Activation, what: str, how: str) -> None:
    """As with Paddle's operators: what is read again must not have changed, and what is not may have."""
    layer = fw.BatchNorm2D(4, act=act)
    x, residual = leaves((2, 4, 3, 3))
    weight = arrays((2, 4, 3, 3))[2]

    def gradients(*, changed: bool) -> list[np.ndarray]:
        tensors = {"x": x * 1.0, "residual": residual * 1.0}
        tensors["y"] = layer(tensors["x"], tensors["residual"])
        end = tensors["y"] * 1.0  # which keeps nothing
        if changed:
            change(tensors[what], how)
        end.backward(tensor_of(weight))
        found = [x.grad.numpy(), residual.grad.numpy()]
        x.clear_gradient(False)
        residual.clear_gradient(False)
        return found

    read = {"x", "residual"} if act in KEPT else {"x"} if act == "none" else {"x", "y"}
    expected = gradients(changed=False)
    if what in read:
        words = {"x": "the input", "residual": "the residual", "y": "the output"}[what]
        with pytest.raises(OSError, match=rf"InputError: {words} of a norm layer.*in-place.*version 1 instead of 0"):
            gradients(changed=True)
    else:
        for found, wanted in zip(gradients(changed=True), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_a_change_before_the_layer_is_none() -> None:
    layer = fw.BatchNorm2D(4, act="relu")
    x, residual = leaves((2, 4, 3, 3))
    changed = (x * 1.0).add_(paddle.ones_like(x))
    layer(changed, residual).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", [None, "residual"])
def test_a_change_of_the_input_is_an_error_in_group_norm_too(kind: str | None) -> None:
    layer = fw.GroupNorm(2, 4)
    x, residual = leaves((2, 4, 3, 3))
    middle = x * 1.0
    y = layer(middle, residual if kind else None)
    middle.zero_()
    with pytest.raises(OSError, match="InputError: the input of a norm layer"):
        y.sum().backward()


def test_parameters_may_change_unless_their_values_are_read() -> None:
    layer = fw.BatchNorm2D(4, act="relu")
    x, residual = leaves((2, 4, 3, 3))
    layer(x, residual).square().sum().backward()
    expected = x.grad.numpy()
    x.clear_gradient(False)
    loss = layer(x, residual).square().sum()
    with paddle.no_grad():
        layer.weight.zero_()
    loss.backward()  # the kernels have γ and β of the forward pass
    np.testing.assert_array_equal(x.grad.numpy(), expected)
    loss = layer(x, residual).square().sum()
    with paddle.no_grad():
        layer.weight.fill_(1.0)
    with pytest.raises(OSError, match="InputError: the weight of a norm layer"):
        paddle.grad(loss, [x], create_graph=True)
